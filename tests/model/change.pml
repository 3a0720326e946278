/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors
 *
 * A lease changes between exclusive and reading (lease::downgrade, lease::upgrade), is healed after a libvirtd that died in
 * between, and what its vessel says of it. Guests 0 and 1 have the file open for reading for good; each call of libvirt lets
 * its QEMU write, or ends that. Guest 2 comes and goes in any mode. A lease is two shares: 0 is the one that all hosts
 * see, 1 the companion that those of the same host see. ALONE: no guest 1.
 * NCR: libvirtds that die, before any step; NOP: calls; NE: how often guest 2 comes; NK: deaths of QEMUs.
 * B: the shares (bits) whose descriptor is open for reading only: they go up through a second one.
 * NFS3: a read lock does not show in a look. */
#ifndef NCR
#define NCR 0
#endif
#ifndef NOP
#define NOP 2
#endif
#ifndef NE
#define NE 0
#endif
#ifndef NK
#define NK 0
#endif
#ifndef B
#define B 0
#endif
#define BIT(k) (1<<(k))
#define HAS(m,k) (((m)>>(k))&1)
#define ON(m,k) m=m|BIT(k)
#define OFF(m,k) m=m&~BIT(k)
#define V(k,r) ((k)*2+(r))
#define SAY(i,what) printf("\n%d ", i); printf(what)
#define PICK(v,must,may) if :: (may) -> v=1 :: !(must) -> v=0 fi
mtype = { exclusive, reading, shared };

/* marks, by share; a bit a guest */
byte oW[2], oR[2];         /* owner for writing: guest+1; for reading */
byte pX[2], pS[2], pR[2];  /* present in a mode */
byte second;               /* bit V: owner and present-exclusive are up through a second description, which only libvirtd has */
byte writable;             /* bit V: the vessel's descriptor is open for writing */
byte stale;                /* bit V: the description of before is still in the vessel, with its present-readOnly */
byte note;                 /* bit V: the note says owner */
byte hand;                 /* bit V: handoff or leaving is up */
/* the vessel's entry */
mtype mode[2];
byte changing;
/* what is so */
byte alive, attached[3];   /* shares that a guest uses */
byte reads, writes;
byte in; short s[6], e[6]; /* who looks: marks that were up all the time, some of the time */
byte nop=NOP, ncr=NCR, ne=NE, nk=NK, done;

#ifdef NFS3
#define SEENR(r) (pR[r]&(HAS(writable,V(0,r))|(HAS(writable,V(1,r))<<1)))
#else
#define SEENR(r) pR[r]
#endif
#define CUR(r) (pX[r]|(pS[r]<<3)|(SEENR(r)<<6))
#define SEE1(k,r) s[V(k,r)]=s[V(k,r)]&CUR(r); e[V(k,r)]=e[V(k,r)]|CUR(r)
#define SEE(k) if :: HAS(in,k) -> SEE1(k,0); SEE1(k,1) :: else fi
#define NOW(k) s[V(k,0)]=CUR(0); e[V(k,0)]=CUR(0); s[V(k,1)]=CUR(1); e[V(k,1)]=CUR(1)
#define GONE(k) OFF(in,k); s[V(k,0)]=0; e[V(k,0)]=0; s[V(k,1)]=0; e[V(k,1)]=0
#ifdef M_DROPPR
#define SHOWN(k,r) true
#else
#define SHOWN(k,r) (HAS(pX[r],k) || HAS(pR[r],k))
#endif
/* the vessel never says more than the marks */
#define VESSEL(k,r) assert(!HAS(alive,k) || !HAS(attached[k],r) || (SHOWN(k,r) && (mode[k]!=exclusive || (oW[r]==k+1 && HAS(pX[r],k)))))
#define UPD SEE(0); SEE(1); SEE(2); VESSEL(0,0); VESSEL(0,1); VESSEL(1,0); VESSEL(1,1); \
  assert(!HAS(note,0) || oW[0]==1); assert(!HAS(note,1) || oW[1]==1); assert(!HAS(note,2) || oW[0]==2); assert(!HAS(note,3) || oW[1]==2)
#define EVERY(k,all) (((all)&~BIT(k))|(((all)&~BIT(k))<<3)|(((all)&~BIT(k))<<6))
#define SAFE(k) assert((reads&~BIT(k))==0)   /* who begins to write is alone */

#define CRASH(i) ncr>0 -> ncr--; cr=1; SAY(i,"LIBVIRTD DIES"); DROPB(i)
/* the second descriptions go with the libvirtd that has them */
#define DROP1(i,r) if :: HAS(second,V(i,r)) -> OFF(second,V(i,r)); oW[r]=0; OFF(pX[r],i); OFF(note,V(i,r)) :: else fi
#define DROPB(i) d_step { DROP1(i,0); DROP1(i,1); UPD }
#define S(i,what,x) if :: cr :: !cr -> atomic { if :: d_step { SAY(i,what); x; UPD; NOW(i) } :: CRASH(i) fi } fi
#define BOTH(F,i) F(i,0); F(i,1)
#define USE(i,r) (!cr && HAS(attached[i],r))
#define SECOND(i,r) (HAS(B,r) && !HAS(writable,V(i,r)))

#define CLR(k,r) if :: oW[r]==k+1 -> oW[r]=0 :: else fi; OFF(oR[r],k); OFF(pX[r],k); OFF(pS[r],k); OFF(pR[r],k); if :: k<2 -> OFF(note,V(k,r)); OFF(stale,V(k,r)) :: else fi

/* brings the marks of a reading lease to what the vessel says; `whole` when all are */
#define H1(i,r) if :: USE(i,r) -> \
  S(i,"  handoff down",OFF(note,V(i,r)); OFF(hand,V(i,r))); \
  if :: !HAS(pR[r],i) -> S(i,"  present-readOnly up",ON(pR[r],i)) :: else fi; \
  if :: !cr && !HAS(oR[r],i) -> \
     if :: atomic { oW[r]==0 || oW[r]==i+1 -> if :: d_step { SAY(i,"  owner for reading"); oW[r]=0; ON(oR[r],i); UPD; NOW(i) } :: CRASH(i) fi } \
        :: atomic { oW[r]!=0 && oW[r]!=i+1 -> whole=0; SAY(i,"  owner refused") } fi :: else fi; \
  if :: whole && HAS(pX[r],i) -> S(i,"  present-exclusive down",OFF(pX[r],i)) :: else fi :: else fi
#define AGREED(i,r) (!HAS(attached[i],r) || (mode[i]==exclusive && oW[r]==i+1 && HAS(pX[r],i) && !HAS(pR[r],i)) || \
  (mode[i]==reading && HAS(oR[r],i) && oW[r]!=i+1 && HAS(pR[r],i) && !HAS(pX[r],i) && !HAS(note,V(i,r)) && !HAS(hand,V(i,r))))

#define TIDY(i,r) if :: HAS(stale,V(i,r)) -> S(i,"  description of before gone",OFF(stale,V(i,r)); OFF(pR[r],i)) :: else fi
/* 2. */
#define U2(i,r) if :: USE(i,r) && go -> \
   if :: SECOND(i,r) -> S(i,"  owner for reading down",OFF(oR[r],i); DROPPR(i,r)) :: else fi; \
   if :: !cr -> if :: atomic { oW[r]==0 && (oR[r]&~BIT(i))==0 -> if :: d_step { SAY(i,"  owner for writing"); OFF(oR[r],i); oW[r]=i+1; if :: SECOND(i,r) -> ON(second,V(i,r)) :: else fi; UPD; NOW(i) } :: CRASH(i) fi } \
      :: atomic { oW[r]!=0 || (oR[r]&~BIT(i))!=0 -> go=0; SAY(i,"  owner refused") } fi :: else fi :: else fi
#ifdef M_DROPPR
#define DROPPR(i,r) OFF(pR[r],i)
#else
#define DROPPR(i,r) skip
#endif
#define U3(i,r) if :: USE(i,r) && go -> S(i,"  present-exclusive up",ON(pX[r],i)) :: else fi
#define U4(i,r) if :: USE(i,r) && go -> atomic { PICK(t,(s[V(i,r)]&EVERY(i,7))!=0,(e[V(i,r)]&EVERY(i,7))!=0); if :: t -> go=0; SAY(i,"  somebody is there") :: else fi; t=0 } :: else fi
#define U5(i,r) if :: USE(i,r) -> if :: !HAS(second,V(i,r)) -> S(i,"  present-readOnly down",OFF(pR[r],i)) :: else fi; S(i,"  noted",ON(note,V(i,r))) :: else fi
#define STORE(i,r) if :: HAS(second,V(i,r)) -> OFF(second,V(i,r)); ON(writable,V(i,r)); ON(stale,V(i,r)) :: else fi
#ifdef M_NOLOOK
#define ALL4(i) skip
#else
#define ALL4(i) BOTH(U4,i)
#endif
#ifdef M_NOHEAL
#define CHANGING(i) skip
#else
#define CHANGING(i) ON(changing,i)
#endif
#ifdef M_VESSELFIRST
#define FIRST(i) mode[i]=exclusive
#else
#define FIRST(i) CHANGING(i)
#endif
#ifdef M_VESSELLAST
#define SAYS(i) skip
#define LAST(i) mode[i]=reading; OFF(changing,i)
#else
#define SAYS(i) mode[i]=reading; CHANGING(i)
#define LAST(i) OFF(changing,i)
#endif
#ifdef M_UNDOONE
#define SETTLE(i) if :: !undo -> H1(i,0) :: else fi; H1(i,1)
#else
#define SETTLE(i) BOTH(H1,i)
#endif
#ifdef M_NOFACT
#define READONLY(i) false
#else
#define READONLY(i) last        /* QEMU has it open for reading only: a libvirtd that died has told nobody that the lease went up */
#endif

proctype Guest(byte i) { bool cr, whole, go, t, fix, up, down, undo, last;
next:
  do
  :: atomic { nop>0 && HAS(alive,i) && !HAS(writes,i) && !last -> nop--; up=1; SAY(i,"UPGRADE") }; goto call
  :: atomic { HAS(writes,i) && HAS(alive,i) -> OFF(writes,i); down=1; SAY(i,"DOWNGRADE") }; goto call     /* QEMU has it open for reading again */
  :: atomic { nk>0 && HAS(alive,i) -> nk--; SAY(i,"QEMU dies"); d_step { OFF(alive,i); OFF(reads,i); OFF(writes,i); OFF(changing,i); OFF(hand,V(i,0)); OFF(hand,V(i,1)); CLR(i,0); CLR(i,1); mode[i]=reading; UPD } }
  :: ((nop==0 && !HAS(writes,i)) || !HAS(alive,i)) && !last -> done++; (done==2+(NE>0)); last=1;
     /* whoever is still there when the others have gone is healed by its next call */
     if :: atomic { HAS(alive,i) -> SAY(i,"ANOTHER CALL") }; goto call :: else -> break fi
  od;
  goto stop;
call: skip;
  d_step { ON(in,i); NOW(i); fix=HAS(changing,i) };
#ifndef M_TIDYLAST
  BOTH(TIDY,i);
#endif
again:
  if :: fix -> whole=1; SETTLE(i); if :: whole -> S(i,"  vessel: whole",LAST(i)); fix=0; undo=0 :: else -> goto out fi :: else fi;
  if
  :: !cr && down -> S(i,"  vessel: reading, changing",SAYS(i)); down=0; fix=1; goto again
  :: !cr && up -> up=0;
     if
     :: mode[i]==reading -> go=1; S(i,"  vessel: changing",FIRST(i));
        BOTH(U2,i); BOTH(U3,i); ALL4(i);
        if
        :: go -> BOTH(U5,i); S(i,"  vessel: exclusive, whole",mode[i]=exclusive; OFF(changing,i); STORE(i,0); STORE(i,1)); BOTH(TIDY,i)
        /* refused: the second descriptions are closed first, the rest is a change back */
        :: !go && !cr -> S(i,"  second description closed",DROP1(i,0); DROP1(i,1)); undo=1; fix=1; goto again
        :: else
        fi
     :: else -> go=1                                    /* it went up in a call that told nobody */
     fi;
     if :: atomic { go && !cr -> SAY(i,"writes"); ON(writes,i); SAFE(i) } :: else fi
  :: !cr && READONLY(i) && mode[i]==exclusive -> down=1; goto again
  :: else
  fi;
out: skip;
#ifdef M_TIDYLAST
  BOTH(TIDY,i);
#endif
  d_step { assert(cr || (HAS(changing,i) && !last) || (AGREED(i,0) && AGREED(i,1) && (!last || mode[i]==reading)));
    GONE(i); cr=0; whole=0; go=0; fix=0; up=0; down=0; undo=0 };
  if :: !last -> goto next :: else fi;
stop: skip }

#if NE
/* lease::registerAll; a reader asks for present-exclusive and present-shared only */
#define BADFOR (m==exclusive -> EVERY(2,7) : (m==shared -> (3|(3<<6)) : (3|(3<<3))))
#define ASK(r) if :: go && HAS(attached[2],r) -> atomic { PICK(t,(s[V(2,r)]&BADFOR)!=0,(e[V(2,r)]&BADFOR)!=0); if :: t -> go=0 :: else fi; t=0 } :: else fi
#define ENTER(r) if :: go && HAS(attached[2],r) -> \
  if :: d_step { m==reading && oW[r]==0 -> SAY(2,"  owner for reading"); ON(oR[r],2); UPD; NOW(2) } \
     :: d_step { m!=reading && oW[r]==0 && oR[r]==0 -> SAY(2,"  owner for writing"); oW[r]=3; UPD; NOW(2) } \
     :: go=0 fi :: else fi
#define SHOW(r) if :: go && HAS(attached[2],r) -> d_step { SAY(2,"  present up"); if :: m==exclusive -> ON(pX[r],2) :: m==shared -> ON(pS[r],2) :: m==reading -> ON(pR[r],2) fi; UPD; NOW(2) } :: else fi
proctype Other() { mtype m; bool go, t;
  do
  :: ne>0 -> ne--;
     if :: m=exclusive :: m=shared :: m=reading fi;
     if :: attached[2]=1 :: attached[2]=3 fi;
     d_step { go=1; ON(in,2); NOW(2) };
     ASK(0); ASK(1); ENTER(0); ENTER(1); SHOW(0); SHOW(1); d_step { NOW(2) }; ASK(0); ASK(1);
     if :: go && m==shared -> d_step { SAY(2,"  owner given back"); oW[0]=0; if :: oW[1]==3 -> oW[1]=0 :: else fi; UPD; NOW(2) } :: else fi;
     if :: go -> atomic { SAY(2,"runs"); if :: m!=reading -> SAFE(2); ON(writes,2) :: else fi; assert((writes&3)==0); ON(reads,2) } :: else fi;
     d_step { SAY(2,"goes"); GONE(2); OFF(reads,2); OFF(writes,2); CLR(2,0); CLR(2,1); attached[2]=0; go=0; m=0; UPD }
  :: ne==0 -> break
  od;
  done++ }
#endif

#define START(k,sh) ON(alive,k); ON(reads,k); attached[k]=sh
#define READS1(k,r) if :: HAS(attached[k],r) -> ON(oR[r],k); ON(pR[r],k); if :: !HAS(B,r) -> ON(writable,V(k,r)) :: else fi :: else fi
init { atomic {
  mode[0]=reading; mode[1]=reading;
  if
  :: START(0,3); READS1(0,0); READS1(0,1);
#ifndef ALONE
     if :: START(1,1) :: START(1,2) :: START(1,3) fi;     /* on another host; on this one, by another name; by the same */
     READS1(1,0); READS1(1,1)
#endif
  :: START(0,3); mode[0]=exclusive; ON(writes,0); oW[0]=1; oW[1]=1; pX[0]=1; pX[1]=1; note=3; writable=3; if :: hand=3 :: skip fi     /* wherever a handoff came from */
  fi;
  run Guest(0); run Guest(1);
#if NE
  run Other();
#endif
  skip } }
