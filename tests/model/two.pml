/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */
/* All-or-nothing over several resources, X mode, cold starters of three domains with overlapping sets {1,2} {2,3} {1,3} (N=3)
 * or {1,2} {1,2} (N=2). SORTED: every host takes the owners in the same order. Undo: everything that this call took. */
#ifndef UNSORT
#define UNSORT 0
#endif
#ifndef N
#define N 2
#endif
byte owner[4], pres[12] /* actor*3+res */; byte ok, done; bool holds[12];
#define P(a,r) pres[(a-1)*3+(r)-1]
#define H(a,r) holds[(a-1)*3+(r)-1]
#define OTHERS(a,r) ((a!=1&&P(1,r))||(a!=2&&P(2,r))||(a!=3&&P(3,r)))
#define FREE(r) if :: owner[r]==a -> owner[r]=0 :: else fi; P(a,r)=0
proctype Starter(byte a; byte x; byte y) { bool f; byte n;
  d_step { if :: a==2 && UNSORT -> n=x; x=y; y=n :: else fi }
#ifndef M_PRESFIRST
  atomic { if :: owner[x]==0 -> owner[x]=a :: else -> f=1 fi };
  if :: f -> goto out :: else fi;
  atomic { if :: owner[y]==0 -> owner[y]=a :: else -> f=1 fi };
  if :: f -> goto undo :: else fi;
  P(a,x)=1; P(a,y)=1;
#else
  P(a,x)=1; P(a,y)=1;
  atomic { if :: owner[x]==0 -> owner[x]=a :: else -> f=1 fi };
  if :: f -> goto undo :: else fi;
  atomic { if :: owner[y]==0 -> owner[y]=a :: else -> f=1 fi };
  if :: f -> goto undo :: else fi;
#endif
  f=OTHERS(a,x); if :: f -> goto undo :: else fi;
  f=OTHERS(a,y); if :: f -> goto undo :: else fi;
  d_step { H(a,x)=1; H(a,y)=1; 
    assert(!((H(1,1)&&(H(2,1)||H(3,1)))||(H(2,1)&&H(3,1))||(H(1,2)&&(H(2,2)||H(3,2)))||(H(2,2)&&H(3,2))||(H(1,3)&&(H(2,3)||H(3,3)))||(H(2,3)&&H(3,3))));
    ok++ }
  goto out;
undo:
#ifdef M_NOUNDO
  skip;
#else
  atomic { FREE(x) }; atomic { FREE(y) };
#endif
out: skip; d_step { done++; 
  /* a refused call leaves nothing */
  assert(H(a,x) || (owner[x]!=a && owner[y]!=a && !P(a,x) && !P(a,y))) } }
init { atomic { if :: N==2 -> run Starter(1,1,2); run Starter(2,1,2) :: else -> run Starter(1,1,2); run Starter(2,2,3); run Starter(3,1,3) fi };
  done==N; assert(ok==1) }
