/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */
/* File-set medium (flock): gate, owner, one presence file per incarnation. Death frees the descriptors one by one, in any order,
 * and leaves the file's NAME behind. 1 = guest that suspends and resumes, 2,3 = strangers with repeated cold starts. */
#ifndef NK
#define NK 1
#endif
#ifndef NS
#define NS 2
#endif
byte gate, owner; bool fe[4], fl[4], w[4], alive[4], killed[4]; byte nk=NK, busy=3;
#define NW (w[1]+w[2]+w[3])
#define WR(k) w[k]=1; assert(NW<=1)
#define S(x) if :: atomic { !killed[i] -> x } :: killed[i] -> goto dead fi
#ifdef M_NOGATE
#define LOCKGATE skip
#define FREEGATE skip
#else
#define LOCKGATE if :: atomic { !killed[i] && gate==0 -> gate=i } :: killed[i] -> goto dead fi
#define FREEGATE S(gate=0)
#endif
inline LOOK(k) { /* is the mark of k alive? sweep it if not */
  if :: k!=i ->
     S(t=fe[k]);
     if :: t -> 
        S(d=fl[k]);                         /* trial flock */
        if :: d -> seen=1 :: else -> S(fe[k]=0) fi
     :: else fi
  :: else fi }
inline VANISH() { /* socket queue is torn down: any order */
  w[i]=0;
  do
  :: d_step { gate==i -> gate=0 }
  :: d_step { owner==i -> owner=0 }
  :: d_step { fl[i] -> fl[i]=0 }
  :: gate!=i && owner!=i && !fl[i] -> break
  od;
  skip;
  d_step { alive[i]=0; killed[i]=0; t=0; d=0; seen=0 } }

proctype Guest(byte i) { bool t,d,seen; byte n;
  /* already running */
  do
  :: n<2 -> n++; 
     S(skip);                                /* STOP; QEMU drains: w stays */
     LOCKGATE;
#ifdef M_NOKEEP
     S(owner=0);                             /* Release as in the text */
#endif
#ifdef M_DROPPRES
     S(fl[i]=0); S(fe[i]=0); S(owner=0);
#endif
     FREEGATE;
     S(w[i]=0);                              /* drained */
     LOCKGATE;
     S(if :: owner==0 -> owner=i :: else fi);
     S(t=(owner==i));
     FREEGATE;
     if :: t -> S(WR(i)) :: else -> break fi
  :: break
  od;
dead: skip; VANISH(); busy-- }

proctype Starter(byte i) { bool t,d,seen; byte n; 
  do
  :: n<NS -> n++; d_step { alive[i]=1; killed[i]=0; seen=0; fe[i]=fe[i] }
     LOCKGATE;
     LOOK(1); LOOK(2); LOOK(3);
     if :: seen -> goto dead :: else fi;
     S(if :: owner==0 -> owner=i :: else fi);
     S(t=(owner==i)); if :: !t -> goto dead :: else fi;
     S(fe[i]=1); 
     S(fl[i]=1);
     FREEGATE;
     S(WR(i));
#ifdef M_NOKEEP
     /* suspend: Release drops owner while QEMU still drains */
     LOCKGATE; S(owner=0); FREEGATE;
#endif
     S(skip);
dead: skip; VANISH()
  :: n>=NS -> break
  od; busy-- }
#ifdef M_SWEEP
active proctype Sweeper() { byte k,n; bool d,t; end: do :: n<2 -> n++; select(k:1..3); t=fe[k]; if :: t -> d=fl[k]; if :: !d -> fe[k]=0 :: else fi :: else fi od }
#endif
active proctype Killer() { byte k; end: do :: atomic { nk>0 -> select(k:1..3); if :: alive[k] -> nk--; killed[k]=1; w[k]=0 :: else fi } od }
init { byte k; bool t; d_step { alive[1]=1; fe[1]=1; fl[1]=1; owner=1; w[1]=1 } atomic { run Guest(1); run Starter(2); run Starter(3) };
  busy==0;  /* L1: nothing is left that blocks: no gate, no owner, no live mark; dead names are swept */
  assert(gate==0 && owner==0 && !fl[1] && !fl[2] && !fl[3]) }
