/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors
 *
 * A guest of two exclusive resources that migrates there and back, with hot-plug and detach of the second one
 * meanwhile, and a stranger that wants the second one too. Every call goes over both resources phase by phase, as
 * Registrar, Acquirer, releaseAll and inquireAll do; libvirtd or a QEMU may die between any two steps. One look at one
 * resource is one instant here (migration.pml has looks that are not).
 */
#ifndef NK
#define NK 0
#endif
#ifndef NCR
#define NCR 0
#endif
#ifndef NOP
#define NOP 1
#endif
#ifndef NMIG
#define NMIG 1
#endif
#ifndef NHP
#define NHP 0
#endif
#ifndef ATT
#define ATT 3              /* attached at the start: bit r = resource r */
#endif
#define BIT(k) (1<<(k))
#define HAS(m,k) (((m)>>(k))&1)
#define ON(m,k) m=m|BIT(k)
#define OFF(m,k) m=m&~BIT(k)
#define E 2                /* the stranger's slot; 0 and 1 are incarnations of D */
#define M(r,i) (2*(r)+(i))
#define SAY(i,what) printf("\n%d ", i); printf(what)
byte owner[2];             /* by resource: 0 free, else slot+1 */
byte presE;                /* the stranger's present, a bit a resource */
byte pres[2];              /* by slot, a bit a resource */
byte leave[2];
byte hand[4], taken[4];    /* by resource and slot: token, 0 none */
byte old[4];               /* a token that is up as well, which nobody was told and no note tells of: a libvirtd that died has left it */
byte nL;                   /* leaving alone is up and not noted, beside a token that is */
byte nO, nT;               /* what Medium::note lacks, a bit M(r,i): owner is up and not noted; handoff or leaving is up and no token is noted */
byte att[2];               /* what the domain definition has, a bit a resource */
byte alive, reg, runs, drain, dup, inc, eruns;
byte ver[2], st[2], jS[2];
byte nk=NK, ncr=NCR, nop=NOP, nmig=NMIG, nhp=NHP;
mtype = { idle, prepare, prepared, finish, finishPaused, done, failed, kill };
mtype cmd[2]=idle;
byte lost;
#define WRITES(i,r) ((HAS(runs,i)||HAS(drain,i)) && HAS(att[i],r))
#define USES(i,r) (HAS(reg,i) && HAS(alive,i) && HAS(att[i],r))
#define UP(i,r) (hand[M(r,i)]!=0 || old[M(r,i)]!=0 || HAS(leave[i],r))
#define SHOWS(i,r) (HAS(att[i],r) && UP(i,r))
#define CHECK1(r) assert(!(WRITES(0,r)&&WRITES(1,r)) && !(HAS(eruns,r)&&(WRITES(0,r)||WRITES(1,r)))); /* S1 */ \
  assert(!((USES(0,r)||USES(1,r)) && !HAS(pres[0],r) && !HAS(pres[1],r) && owner[r]==0));            /* S2 */ \
  assert(((alive|dup)&3)!=0 || (!HAS(pres[0],r) && !HAS(pres[1],r) && (owner[r]==0||owner[r]==E+1) && hand[M(r,0)]==0 && hand[M(r,1)]==0 && old[M(r,0)]==0 && old[M(r,1)]==0)) /* L1 */
#define CHECK CHECK1(0); CHECK1(1)
#define CLR1(r,i) OFF(pres[i],r); OFF(leave[i],r); hand[M(r,i)]=0; old[M(r,i)]=0; taken[M(r,i)]=0; OFF(nO,M(r,i)); OFF(nT,M(r,i)); OFF(nL,M(r,i)); if :: owner[r]==i+1 -> owner[r]=0 :: else fi
#define CLR(i) CLR1(0,i); CLR1(1,i)
#define DIE(i) SAY(i,"QEMU dies"); OFF(alive,i); OFF(reg,i); OFF(runs,i); OFF(drain,i); ver[i]=0; if :: HAS(dup,i) :: else -> CLR(i) fi; CHECK
#define KILLED(i) if :: HAS(alive,i) -> DIE(i) :: else fi
#define CRASH(i) ncr>0 -> ncr--; cr=1; SAY(i,"LIBVIRTD DIES")
#define ST(i,what,x) if :: cr :: !cr -> atomic { if :: d_step { SAY(i,what); x; CHECK } :: CRASH(i) fi } fi
/* the note goes back before the marks change (nb), and down after (na) */
#define ST2(i,what,nb,x,na) if :: cr :: !cr -> atomic { if :: CRASH(i) :: d_step { nb }; if :: CRASH(i) :: d_step { SAY(i,what); x; CHECK }; if :: CRASH(i) :: d_step { na } fi fi fi } fi
#define NOWN(r) (owner[r]==i+1 && !HAS(nO,M(r,i)))
#define NTOK(r) (HAS(nT,M(r,i)) -> 0 : hand[M(r,i)])
#define NLEAVE(r) (HAS(leave[i],r) && !HAS(nT,M(r,i)) && !HAS(nL,M(r,i)))
#define NOTEBACK(r) if :: UP(i,r) -> ON(nT,M(r,i)) :: else fi
#define HANDDOWN(r) hand[M(r,i)]=0; old[M(r,i)]=0; OFF(leave[i],r); OFF(nT,M(r,i)); OFF(nL,M(r,i))
#define ST1(r,c,i,what,x) if :: !cr && go && HAS(who,r) && c -> ST(i,what,x) :: else fi
#define BOTH(S) S(0); S(1)
#define BEGIN(i,what,set) d_step { SAY(i,what); r=0; cr=0; go=1; took=0; held=0; who=set; if :: HAS(alive,i) -> ON(dup,i) :: else -> cr=1 fi }
#define END(i) d_step { if :: HAS(alive,i) -> OFF(dup,i) :: !HAS(alive,i) && HAS(dup,i) -> OFF(dup,i); CLR(i); r=0; CHECK :: else -> r=0 fi; r=(r && !cr); go=0; took=0; held=0; who=0 }
/* looks; i is me, 1-i the only other incarnation ("never a third" in migration.pml) */
#define PEER(r) HAS(pres[1-i],r)
#define STR(r) HAS(presE,r)
#define MAYJOIN(r) (hand[M(r,1-i)]!=0 || old[M(r,1-i)]!=0 || owner[r]==0)
#define HELD(r) HAS(held,r)   /* noted when the call began */
#define OFFERED(r,T) (hand[M(r,1-i)]==T || old[M(r,1-i)]==T)
/* whoever has noted owner on all of them is not asked anything: it has looked with them in hand */
#define ALLOW(r) (!AGAIN(r) || !PEER(r) || (HELD(r) && hand[M(r,1-i)]==0 && old[M(r,1-i)]==0) || (S!=0 && NTOK(r)==S && taken[M(r,1-i)]!=S) || (S!=0 && OFFERED(r,S)))

#define REFS (BIT(old[0])|BIT(old[1])|BIT(old[2])|BIT(old[3])|BIT(hand[0])|BIT(hand[1])|BIT(hand[2])|BIT(hand[3])|BIT(taken[0])|BIT(taken[1])|BIT(taken[2])|BIT(taken[3])|BIT(st[0])|BIT(st[1])|BIT(jS[0])|BIT(jS[1]))
#define DRAW m=REFS; T=1; do :: HAS(m,T) -> T++ :: else -> break od; m=0

/* lease::registerAll over the set `who`, in the child: dies with it; or for a hot-plug (child=0) in libvirtd */
#define RS(x) if :: atomic { HAS(alive,i) && !cr -> x } :: atomic { !HAS(alive,i) || cr -> go=0 } :: atomic { !child && !cr && ncr>0 -> ncr--; cr=1; go=0; SAY(i,"LIBVIRTD DIES") } fi
/* the first look is J1 as well */
#define R1(r) if :: go && HAS(who,r) -> RS(if :: STR(r) || (PEER(r) && !MAYJOIN(r)) -> go=0 :: else -> if :: PEER(r) -> ON(held,r); ON(seen,r) :: else fi fi) :: else fi
#define R2(r) if :: go && HAS(who,r) && !HAS(held,r) -> RS(if :: d_step { owner[r]==0 || owner[r]==i+1 -> owner[r]=i+1; ON(nO,M(r,i)); SAY(i,"  owner taken"); CHECK } :: else -> if :: PEER(r) -> ON(held,r) :: else -> go=0 fi fi) :: else fi
#define R3(r) if :: go && HAS(who,r) && !HAS(held,r) -> RS(d_step { ON(pres[i],r); SAY(i,"  present up"); CHECK }) :: else fi
#define R4(r) if :: go && HAS(who,r) && !HAS(held,r) -> RS(if :: STR(r) -> go=0 :: else -> if :: PEER(r) -> d_step { owner[r]=0; OFF(nO,M(r,i)); ON(held,r); CHECK } :: else fi fi) :: else fi
#define R5(r) if :: go && HAS(who,r) && HAS(held,r) -> RS(if :: !HAS(seen,r) && (STR(r) || !MAYJOIN(r)) -> go=0 :: else -> d_step { ON(pres[i],r); SAY(i,"  joins"); CHECK } fi); \
     if :: go -> RS(if :: STR(r) || !MAYJOIN(r) -> go=0 :: else fi) :: else fi :: else fi
/* a cold start offers what it has: its destination can join, although libvirt calls nothing before it has run */
#ifdef M_HOTHAND
#define OFFERS(child) true
#else
#define OFFERS(child) child
#endif
#define R6(r,child) if :: go && HAS(who,r) && !HAS(held,r) && OFFERS(child) -> RS(d_step { if :: T==0 -> DRAW :: else fi; hand[M(r,i)]=T; ON(nT,M(r,i)); SAY(i,"  handoff up"); CHECK }) :: else fi
#define R7(r) if :: go && HAS(who,r) && !HAS(held,r) -> RS(d_step { OFF(nO,M(r,i)); OFF(nT,M(r,i)) }) :: else fi
#define UNDO(r) if :: !cr && HAS(who,r) -> d_step { CLR1(r,i); CHECK } :: else fi
#ifdef M_NOUNDO
#define UNDOALL skip
#elif defined(M_UNDOONE)
#define UNDOALL UNDO(1)
#else
#define UNDOALL BOTH(UNDO)
#endif
inline REGISTERALL(i,set,child) {
  d_step { r=0; cr=0; go=1; held=0; who=set; SAY(i,"Register") }
  BOTH(R1); BOTH(R2); BOTH(R3); BOTH(R4); BOTH(R5);
  R6(0,child); R6(1,child); BOTH(R7); T=0;
  if :: go -> r=1 :: else -> UNDOALL fi;
  d_step { if :: !r && !cr && HAS(alive,i) -> assert((pres[i]&who)==0 && (!HAS(who,0) || owner[0]!=i+1) && (!HAS(who,1) || owner[1]!=i+1)) :: else fi }
  d_step { go=0; held=0; seen=0; who=0 }
}

/* lease::acquireAll */
#define A1(r) if :: go && !cr && HAS(who,r) -> if :: atomic { ALLOW(r) } :: atomic { !ALLOW(r) -> go=0 } :: atomic { CRASH(i) } fi :: else fi
#define A2(r) if :: go && !cr && HAS(who,r) && !HELD(r) -> if :: atomic { (owner[r]==0 || owner[r]==i+1) && HAS(alive,i) -> owner[r]=i+1; ON(took,r); ON(nO,M(r,i)); SAY(i,"  owner taken") } :: atomic { (owner[r]!=0 && owner[r]!=i+1) || !HAS(alive,i) -> go=0 } :: atomic { CRASH(i) } fi :: else fi
/* whoever has had all owners all along has looked with them in hand already */
#define AGAIN(r) ((held&who)!=who)
#define A3(r) if :: go && !cr && HAS(who,r) && AGAIN(r) -> atomic { if :: !ALLOW(r) -> go=0 :: else fi } :: else fi
#define A4(r) ST1(r,(AGAIN(r) && S!=0 && NTOK(r)!=S && OFFERED(r,S)),i,"  taken",taken[M(r,i)]=S)
#ifdef M_LESSNOTE
#define SURE(r) (NOWN(r) && NTOK(r)==0 && !NLEAVE(r))
#else
#define SURE(r) (NOWN(r) && !UP(i,r))
#endif
#define A5(r) if :: !cr && go && HAS(who,r) && !SURE(r) -> ST2(i,"  handoff and leaving down",OFF(nO,M(r,i)); NOTEBACK(r),HANDDOWN(r),skip) :: else fi
#define A6(r) if :: !cr && HAS(took,r) -> ST(i,"  owner given back",owner[r]=0; OFF(nO,M(r,i))) :: else fi
#ifdef M_CLEAREARLY
/* clears the handoff of each resource as soon as its own owner is there */
#define ORDER A1(0); A2(0); A3(0); A4(0); A5(0); A1(1); A2(1); A3(1); A4(1); A5(1)
#elif defined(M_NORELOOK)
#define ORDER BOTH(A1); BOTH(A2); BOTH(A4); BOTH(A5)
#elif defined(M_ONLYFIRST)
#define ORDER A1(0); A2(0); A3(0); BOTH(A4); BOTH(A5)
#else
#define ORDER BOTH(A1); BOTH(A2); BOTH(A3); BOTH(A4); BOTH(A5)
#endif
inline ACQUIREALL(i,S) {
  BEGIN(i,"Acquire",att[i]);
  d_step { h0=hand[M(0,i)]; h1=hand[M(1,i)]; if :: NOWN(0) -> ON(held,0) :: else fi; if :: NOWN(1) -> ON(held,1) :: else fi };
  ORDER;
  if :: go && !cr -> r=1 :: !go ->
#ifndef M_NOGIVEBACK
    BOTH(A6)
#else
    skip
#endif
  :: else fi;
  /* a refusal has given back what the call took, and nothing else */
  d_step { if :: !r && !cr && HAS(alive,i) -> assert((!HAS(took,0) || owner[0]!=i+1) && (!HAS(took,1) || owner[1]!=i+1));
                 assert(hand[M(0,i)]==h0 && hand[M(1,i)]==h1) :: else fi; h0=0; h1=0 }
  END(i) }

/* lease::releaseAll, lease::inquireAll */
#define HOLDS(r) (NOWN(r) || NTOK(r)!=0)
/* Beside a token that was just drawn may stay what no note tells of, until the next Acquire or Inquire. One that another
 * resource has noted may be up here already, and must not be placed twice (ceph-fuse). */
#define ASIDE(r) if :: fresh && HAS(nT,M(r,i)) -> assert(old[M(r,i)]==0); old[M(r,i)]=hand[M(r,i)]; hand[M(r,i)]=0; if :: HAS(leave[i],r) -> ON(nL,M(r,i)) :: else fi; OFF(nT,M(r,i)) :: else fi
#define L1(r) if :: !cr && HAS(who,r) && HOLDS(r) && NTOK(r)!=T -> \
     d_step { bad=NLEAVE(r) }; if :: !fresh && UP(i,r) -> ST2(i,"  old handoff down",NOTEBACK(r),HANDDOWN(r),skip) :: else fi; \
     if :: bad -> bad=0; ST(i,"  leaving up",ON(leave[i],r); ON(nT,M(r,i))) :: else fi; ST2(i,"  handoff up",skip,ASIDE(r); assert(hand[M(r,i)]!=T && old[M(r,i)]!=T); hand[M(r,i)]=T; ON(nT,M(r,i)),OFF(nT,M(r,i))) :: else fi
#define L2(r) if :: !cr && HAS(who,r) && NLEAVE(r) && owner[r]==i+1 && PEER(r) && hand[M(r,1-i)]==0 && old[M(r,1-i)]==0 -> ST2(i,"  owner given up",ON(nO,M(r,i)),owner[r]=0; OFF(nO,M(r,i)),skip) :: else fi
#define TOKEN(r) if :: HAS(who,r) && NTOK(r)!=0 -> if :: T==0 -> T=NTOK(r) :: T!=0 && T!=NTOK(r) -> bad=1 :: else fi :: else fi
inline RELEASEALL(i) {
  BEGIN(i,"Release",att[i]);
  d_step { T=0; bad=0; TOKEN(0); TOKEN(1);
#ifdef M_DISAGREE
    bad=0;
#endif
#ifdef M_FRESH
    fresh=1;
#else
    fresh=(T==0);
#endif
    if :: T==0 || bad -> DRAW :: else fi; bad=0 }
#ifdef M_RELONE
  L1(0);
#else
  BOTH(L1);
#endif
  BOTH(L2);
  if :: !cr && HAS(alive,i) -> st[i]=T;
     /* the state that libvirt got is good for every resource */
     d_step { assert(!HAS(who,0) || !HOLDS(0) || NTOK(0)==T); assert(!HAS(who,1) || !HOLDS(1) || NTOK(1)==T) } :: else fi;
  T=0; fresh=0; END(i) }
#define I1(r) if :: !cr && go && HAS(who,r) -> ST2(i,"  handoff and leaving down",NOTEBACK(r),HANDDOWN(r),skip); ST(i,"  leaving up",ON(leave[i],r); ON(nT,M(r,i))); ST2(i,"  handoff up",skip,hand[M(r,i)]=T; ON(nT,M(r,i)),OFF(nT,M(r,i))) :: else fi
inline INQUIREALL(i) {
  BEGIN(i,"Inquire",att[i]);
  d_step { DRAW; jS[i]=T }
  BOTH(I1);
  T=0; r=1; END(i) }

#define STOP(i) d_step { SAY(i,"stops, drains"); if :: HAS(runs,i) -> OFF(runs,i); ON(drain,i) :: else fi }
#define CONT(i) d_step { if :: HAS(alive,i) -> SAY(i,"runs"); assert(!SHOWS(i,0) && !SHOWS(i,1));     /* lets nobody join */ \
     assert(ver[i]>0 && !(HAS(alive,1-i) && ver[1-i]>ver[i])); /* S4 */ \
     ON(runs,i); OFF(drain,i); ver[i]=2; if :: ver[1-i]>0 -> ver[1-i]=1 :: else -> ver[i]=1 fi; CHECK :: else fi }
inline RESUME(i) { ACQUIREALL(i,st[i]); if :: r -> if :: st[i]=0; CONT(i) :: atomic { CRASH(i); if :: st[i]=0 :: skip fi } fi :: else fi }
#define ANSWER(i,x) cmd[i]=(HAS(lost,i) -> idle : x); OFF(lost,i); OFF(inc,i); jS[i]=0

#ifdef LIVE
#define MAYMIGRATE !HAS(alive,1-i) && cmd[1-i]==idle
#else
#define MAYMIGRATE true       /* where the other incarnation still lives: Inquire, and then no third is let in */
#endif
proctype Host(byte i) { byte r,go,T,m,took,held,seen,who,h0,h1; bool cr,live,bad,fresh;
  end: do
  :: atomic { nop>0 && HAS(runs,i) -> nop--; SAY(i,"USER SUSPENDS") }; STOP(i); RELEASEALL(i);
#ifdef REL2
     if :: RELEASEALL(i) :: skip fi
#endif
  :: atomic { nop>0 && HAS(reg,i) && !HAS(inc,i) && !HAS(runs,i) && !HAS(drain,i) -> nop--; SAY(i,"USER RESUMES") }; RESUME(i)
#if NHP>0
  /* attach-disk: registerAll of the new resource in libvirtd, before QEMU opens it; refused or crashed: QEMU never sees it */
  :: atomic { nhp>0 && HAS(reg,i) && HAS(alive,i) && !HAS(inc,i) && !HAS(att[i],1) -> nhp--; SAY(i,"ATTACHES") };
     d_step { if :: HAS(alive,i) -> ON(dup,i) :: else fi };
     REGISTERALL(i,2,0);
     /* lease::offer: what is added to a suspended guest shows the handoff that the others show */
#ifndef M_HOTHAND
     if :: r && !cr && UP(i,1) -> ST2(i,"  handoff and leaving down",NOTEBACK(1),HANDDOWN(1),skip) :: else fi;   /* Acquire; left by a detach that did not end */
#endif
     if :: r && NTOK(0)!=0 -> ST2(i,"  handoff up",skip,hand[M(1,i)]=NTOK(0); ON(nT,M(1,i)),OFF(nT,M(1,i))) :: else fi;
     d_step { if :: r && !cr && HAS(alive,i) -> ON(att[i],1); assert(hand[M(1,i)]==NTOK(0)); CHECK :: else fi; if :: HAS(alive,i) -> OFF(dup,i) :: !HAS(alive,i) && HAS(dup,i) -> OFF(dup,i); CLR(i); CHECK :: else fi; r=0; cr=0 }
  /* detach-disk: QEMU has closed it; Medium::removeAll is one step */
  :: atomic { nhp>0 && HAS(reg,i) && HAS(alive,i) && !HAS(inc,i) && !HAS(drain,i) && HAS(att[i],1) -> nhp--; SAY(i,"DETACHES"); OFF(att[i],1) };
     if :: atomic { CRASH(i) } :: d_step { if :: HAS(alive,i) -> CLR1(1,i); CHECK :: else fi } fi; cr=0
#endif
  /* destination */
  :: cmd[i]==prepare -> d_step { ON(alive,i); att[i]=att[1-i] }; REGISTERALL(i,att[i],1);
#ifdef LIVE
     assert(r);
#endif
     d_step { if :: r && HAS(alive,i) -> ON(reg,i); ON(inc,i); cmd[i]=prepared; CHECK :: else -> KILLED(i); cmd[i]=failed fi; r=0; cr=0 }
  :: d_step { cmd[i]==kill -> KILLED(i); OFF(inc,i); jS[i]=0; st[i]=0; cmd[i]=idle }
  :: d_step { cmd[i]==finishPaused -> if :: HAS(alive,i) -> st[i]=jS[i]; ANSWER(i,done) :: else -> ANSWER(i,failed) fi }
  :: cmd[i]==finish -> ACQUIREALL(i,jS[i]);
     if
     :: r -> CONT(i); d_step { st[i]=0; ANSWER(i,done) }
     :: d_step { !r -> KILLED(i); ANSWER(i,failed) }
     :: atomic { !r && cr && HAS(alive,i) -> SAY(i,"left paused"); if :: st[i]=jS[i] :: skip fi; ANSWER(i,failed) }
     fi
  /* source */
  :: atomic { nmig>0 && HAS(reg,i) && HAS(alive,i) && !HAS(inc,i) && !HAS(drain,i) && MAYMIGRATE -> nmig--; SAY(i,"MIGRATES"); live=HAS(runs,i) };
     if :: live -> INQUIREALL(i); if :: r :: else -> goto off fi :: else -> jS[i]=st[i] fi;
     atomic { if :: !HAS(alive,1-i) && !HAS(dup,1-i) && cmd[1-i]==idle -> cmd[1-i]=prepare :: else -> goto off fi };
     (cmd[1-i]==prepared || cmd[1-i]==failed);
     if :: atomic { cmd[1-i]==failed -> cmd[1-i]=idle; goto off } :: else fi;
#ifndef LIVE
     if :: atomic { cmd[1-i]=kill; goto off } :: skip fi;
#endif
     if :: HAS(runs,i) -> STOP(i); RELEASEALL(i); if :: atomic { cr -> cmd[1-i]=kill; goto off } :: else fi :: else fi;
     if
     :: atomic { HAS(alive,i) && !HAS(drain,i) -> SAY(i,"sends RAM"); if :: HAS(alive,1-i) -> ver[1-i]=ver[i] :: else fi; jS[1-i]=jS[i];
           if :: live -> cmd[1-i]=finish :: !live -> cmd[1-i]=finishPaused fi }
     :: atomic { !HAS(alive,i) -> cmd[1-i]=kill; goto off }
     fi;
     if
     :: atomic { cmd[1-i]==done -> cmd[1-i]=idle; if :: d_step { KILLED(i) }
#ifndef LIVE
          :: SAY(i,"CONFIRM LOST")
#endif
          fi }
     :: atomic { cmd[1-i]==failed -> cmd[1-i]=idle };
#ifdef LIVE
        assert(0);
#endif
        if :: HAS(alive,i) -> RESUME(i) :: else fi
#ifndef LIVE
     :: d_step { SAY(i,"CONNECTION LOST"); if :: cmd[1-i]==done || cmd[1-i]==failed -> cmd[1-i]=idle :: else -> ON(lost,1-i) fi };
        if :: HAS(alive,i) -> RESUME(i) :: skip fi
#endif
     fi;
off: skip; d_step { jS[i]=0; live=0; r=0; cr=0; if :: HAS(alive,i) :: else -> st[i]=0 fi }
  :: d_step { !HAS(alive,i) && st[i]!=0 && !HAS(dup,i) -> st[i]=0 }
  od }
proctype Drain() { end: do :: d_step { HAS(drain,0) -> OFF(drain,0) } :: d_step { HAS(drain,1) -> OFF(drain,1) } od }
proctype Killer() { end: do :: d_step { nk>0 && HAS(alive,0) -> nk--; DIE(0) } :: d_step { nk>0 && HAS(alive,1) -> nk--; DIE(1) } od }
#ifdef NE
byte ne=NE;
/* a stranger that wants resource 1 */
proctype Stranger() { bool t;
  end: do :: ne>0 -> ne--; 
     atomic { if :: HAS(pres[0],1) || HAS(pres[1],1) || owner[1]!=0 -> t=0 :: else -> t=1; owner[1]=E+1 fi };
     if :: t -> d_step { ON(presE,1) }; atomic { if :: HAS(pres[0],1) || HAS(pres[1],1) :: else -> d_step { ON(eruns,1); CHECK } fi }; :: else fi;
     d_step { t=0; eruns=0; presE=0; if :: owner[1]==E+1 -> owner[1]=0 :: else fi }
  od }
#endif
/* it runs, or was started paused and Register was all that has happened */
#define STARTED hand[0]=1; if :: HAS(ATT,1) -> hand[2]=1 :: else fi
init { atomic { alive=1; reg=1; att[0]=ATT; if :: STARTED :: runs=1 fi; pres[0]=ATT; owner[0]=1; if :: HAS(ATT,1) -> owner[1]=1 :: else fi; ver[0]=1;
  run Host(0); run Host(1); run Drain(); run Killer();
#ifdef NE
  run Stranger();
#endif
  skip } }
