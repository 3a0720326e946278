/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */
/* Cold starters of N different domains in modes X (exclusive), SW (shareable), RO (readonly).
 * OWNER is one byte used as a read/write lock: X holds W for good, RO holds R for good, SW holds W only while it enters.
 * Flags: TEXT = place present, look, (owner only for X); NFS3 = GETLK does not see remote read locks (present(ro) is one);
 * COMES: readers come and go; M_PRESFIRST, M_NOLOOK, M_ASKONCE mutants; NK kills. */
#define X 1
#define SW 2
#define RO 3
#ifndef N
#define N 3
#endif
#ifndef NK
#define NK 0
#endif
byte wo; bool ro[4];             /* the owner byte: writer, readers */
byte pm[4];                      /* present(mode) of actor; 0 none */
byte pm2[4];                     /* second present mark during a downgrade */
bool alive[4]; byte running[4];  /* mode it may write/read in */
byte mode[4]; byte done, ok, nk=NK, kills;
#define OTH(i,e) ((i!=1&&(e(1)))||(i!=2&&(e(2)))||(i!=3&&(e(3))))
#ifdef NFS3
#define SEES(k) (pm[k]==X||pm[k]==SW||pm2[k]==X)
#else
#define SEES(k) (pm[k]!=0)
#endif
#define SEEXS(k) (pm[k]==X||pm[k]==SW||pm2[k]==X)
#ifdef NFS3
#define SEEXR(k) (pm[k]==X||pm2[k]==X)
#else
#define SEEXR(k) (pm[k]==X||pm[k]==RO||pm2[k]==X)
#endif
#define RDR(k) ro[k]
#define CLR(i) if :: wo==i -> wo=0 :: else fi; ro[i]=0; pm[i]=0; pm2[i]=0
#define TRYW(i) if :: (wo==0||wo==i) && !OTH(i,RDR) -> wo=i; own=1 :: else -> own=0 fi
#define TRYR(i) if :: wo==0||wo==i -> if :: wo==i -> wo=0 :: else fi; ro[i]=1; own=1 :: else -> own=0 fi
#define S(x) if :: atomic { alive[i] -> x } :: !alive[i] -> goto dead fi
#define INC(m) ((m==X && OTH(i,SEES)) || (m==SW && OTH(i,SEEXR)) || (m==RO && OTH(i,SEEXS)))
#define RUNX(k) running[k]!=0
#define RUNSX(k) (running[k]==X||running[k]==SW)
#define RUNXR(k) (running[k]==X||running[k]==RO)
#define BAD(m) ((m==X && OTH(i,RUNX)) || (m==SW && OTH(i,RUNXR)) || (m==RO && OTH(i,RUNSX)))

/* a reader asks one question, whether a present-exclusive or present-shared is up; a shared guest asks two, for
 * present-exclusive and then for present-read-only; no answer is of one instant */
#define ASK1(k,sees) :: left&(1<<k) -> S(t=(t||sees(k))); left=left&~(1<<k)
#define ASKALL(sees) left=14&~(1<<i); do ASK1(1,sees) ASK1(2,sees) ASK1(3,sees) :: left==0 -> break od
#define SEEX(k) (pm[k]==X||pm2[k]==X)
#ifdef NFS3
#define SEER(k) false
#else
#define SEER(k) (pm[k]==RO)
#endif
#define ASK t=0; if :: mode[i]==X -> S(t=INC(X)) :: mode[i]==RO -> ASKALL(SEEXS) :: mode[i]==SW -> ASKALL(SEEX); ASKALL(SEER) fi
#ifdef M_ASKONCE
#define ASKAGAIN if :: mode[i]!=RO -> ASK :: else -> t=0 fi
#else
#define ASKAGAIN ASK
#endif
proctype Starter(byte i) { bool own,t,back; byte tries,left;
  if :: mode[i]=X :: mode[i]=SW :: mode[i]=RO fi;
#ifdef ALLX
  (mode[i]==X);
#endif
  alive[i]=1;
again:
#ifdef TEXT
  /* DESIGN 3 as written: present, look; owner for X; a mutual refusal is retried RETRY times */
  S(pm[i]=mode[i]);
  S(t=INC(mode[i]));
  if :: t -> S(CLR(i)); if :: tries<RETRY -> tries++; goto again :: else -> goto fail fi :: else fi;
  if :: mode[i]==X -> S(TRYW(i)); if :: !own -> S(CLR(i)); goto fail :: else fi :: else fi;
#else
#ifdef M_PRESFIRST
  S(pm[i]=mode[i]);
#endif
  ASK;                                              /* advisory: explains, and keeps off the owner byte */
  if :: t -> S(CLR(i)); goto fail :: else fi;
  if
  :: mode[i]==RO -> S(TRYR(i))
  :: else -> S(TRYW(i))
  fi;
  if
  :: own -> skip
  :: else ->                                         /* busy: who? */
     S(t=INC(mode[i]));
#ifdef M_PRESFIRST
     S(CLR(i)); goto fail;
#endif
     if :: t -> goto fail
        :: !t && tries<RETRY -> tries++;
           if :: (wo==0 || wo==i) && (mode[i]==RO || !OTH(i,RDR)) -> goto again
              :: INC(mode[i]) -> goto fail
              :: mode[i]!=RO && OTH(i,RDR) -> goto fail      /* busy by readers that GETLK cannot see */
              :: !alive[i] -> goto dead fi
        :: else -> goto fail fi
  fi;
  S(pm[i]=mode[i]);
#ifndef M_NOLOOK
  ASKAGAIN;
  if :: t -> S(CLR(i)); goto fail :: else fi;
#endif
  if :: mode[i]==SW -> S(wo=0) :: else fi;
#endif
  S(running[i]=mode[i]; assert(!BAD(mode[i])));
#ifdef COMES
  /* a lease for reading, of a file below an image: given back, and taken again */
  if :: mode[i]==RO && !back && alive[i] -> back=1; S(running[i]=0; CLR(i)); goto again :: skip fi;
#endif
  ok++;
#ifdef DOWN
  if
  :: mode[i]==X ->                                    /* end of a block commit: downgrade */
#ifdef M_DOWNDROP
     S(wo=0); 
#endif
     S(running[i]=RO);
     S(pm2[i]=X; pm[i]=RO);                           /* place present(ro), keep present(x) */
     S(TRYR(i)); assert(own);                         /* W->R of one's own byte: one atomic step, cannot be refused */
     S(pm2[i]=0);
     /* and up again for the next commit */
     if
     :: S(TRYW(i)); 
        if
        :: own -> S(ro[i]=0; pm2[i]=X); S(t=OTH(i,SEEXS)||(OTH(i,RDR)));
           if :: t -> S(TRYR(i)); S(pm2[i]=0) :: else -> S(pm[i]=X; pm2[i]=0); S(running[i]=X; assert(!BAD(X))) fi
        :: else  /* refused: the read lock is still there (fcntl, not flock) */ assert(ro[i] || !alive[i])
        fi
     :: skip
     fi
  :: else fi;
#endif
  goto fin;
fail: if :: alive[i] -> atomic { alive[i]=0; CLR(i); running[i]=0 } :: else fi;
dead: skip;
fin: done++
}
active proctype Killer() { byte k; end: do :: atomic { nk>0 -> select(k:1..3); if :: alive[k] -> nk--; kills++; alive[k]=0; running[k]=0; CLR(k) :: else fi } od }
init { atomic { run Starter(1); if :: N>=2 -> run Starter(2) :: else fi; if :: N>=3 -> run Starter(3) :: else fi };
  (done==N);
#ifndef NOL2
  assert(ok>=1 || kills>0);                           /* L2: never do all fail */
  /* X against X: exactly one */
  assert(kills>0 || !(mode[1]==X && mode[2]==X && (N<3 || mode[3]==X)) || ok==1);
  assert(kills>0 || !((mode[1]==SW && mode[2]==SW && (N<3 || mode[3]==SW)) || (mode[1]==RO && mode[2]==RO && (N<3||mode[3]==RO))) || ok==N)
#else
  skip
#endif
}
