/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors
 *
 * Chains of migrations of one guest with one exclusive resource: A to B to C, or there and back.
 * See README.md for what the flags mean and which function of core/lease each step is.
 */
#include "marks.h"
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
#define NMIG 2
#endif
byte nk=NK, ncr=NCR, nop=NOP, nmig=NMIG;
byte st[3];                 /* lock state (token) that libvirt keeps for the guest */
byte jS[3];                 /* state in the cookie: of the job this slot is source of, or of the Finish it was sent */
#define STALE 9
mtype = { idle, prepare, prepared, finish, finishPaused, done, failed, kill };
mtype cmd[3]=idle;          /* to the slot's libvirtd as destination, and its answer */
byte inc;                   /* incoming: QEMU waits for the RAM */

/* one step of a call in libvirtd: done, or libvirtd dies before it */
#define CRASH(i) ncr>0 -> ncr--; cr=1; SAY(i,"LIBVIRTD DIES")
#define ST(i,what,x) if :: cr -> skip :: !cr -> atomic { if :: d_step { SAY(i,what); x; UPD; NOW(i) } :: CRASH(i) fi } fi
/* a note goes back before its marks change, and down after they have: NB before, NA after, both part of the step for all others */
#define ST2(i,what,nb,x,na) if :: cr -> skip :: !cr -> atomic { if :: CRASH(i) :: d_step { nb }; \
  if :: CRASH(i) :: d_step { SAY(i,what); x; UPD; NOW(i) }; if :: CRASH(i) :: d_step { na } fi fi fi } fi
#define SHOWS(i) (mytok[i]!=0 || old[i]!=0 || HAS(leave,i))
#define NOTEBACK(i) if :: SHOWS(i) -> ON(lt,i) :: else fi
#define BEGIN(i,what) d_step { SAY(i,what); r=0; cr=0; if :: HAS(alive,i) -> ON(dup,i); ON(in,i); NOW(i) :: else -> cr=1 fi }
#define END(i) d_step { GONE(i); if :: HAS(alive,i) -> OFF(dup,i) :: !HAS(alive,i) && HAS(dup,i) -> OFF(dup,i); VANISH(i); UPD; r=0 :: else -> r=0 fi; if :: cr -> r=0 :: else fi; t=0; u=0 }

/* Medium::removeHandoff: one unlock, or two files closed one after the other */
#ifdef FILESET
#define HANDOFFDOWN(i) if :: ST2(i, "  handoff down", NOTEBACK(i), mytok[i]=0; old[i]=0, skip); ST2(i, "  leaving down", skip, OFF(leave,i); OFF(ll,i), OFF(lt,i)) \
  :: ST2(i, "  leaving down", NOTEBACK(i), OFF(leave,i); OFF(ll,i), skip); ST2(i, "  handoff down", skip, mytok[i]=0; old[i]=0, OFF(lt,i)) fi
#else
#define HANDOFFDOWN(i) ST2(i, "  handoff and leaving down", NOTEBACK(i), mytok[i]=0; old[i]=0; OFF(leave,i); OFF(ll,i); OFF(lt,i), skip)
#endif
#define REF(k) (BIT(mytok[k])|BIT(old[k])|BIT(st[k])|BIT(jS[k])|tkh[k]|eH[k]|eT[k])
/* a token nobody remembers is as good as a new one, and keeps the state space small */
#define DRAW(i) m=REF(0)|REF(1)|REF(2)|BIT(mytok[3])|BIT(old[3])|tkh[3]|eH[3]|eT[3]; mytok[i]=1; \
   do :: HAS(m,mytok[i]) -> mytok[i]=mytok[i]+1 :: else -> break od; m=0; assert(mytok[i]<STALE)
/* ---- lease::registerAll, one resource: r = 0 refused, 1 owner, 2 joined. In the child; marks are gone with it. ---- */
#define CHILD(i,x) if :: atomic { HAS(alive,i) -> x } :: atomic { !HAS(alive,i) -> go=0 } fi
#define REFUSE(i) d_step { SAY(i,"  refused"); CLR(i); UPD; NOW(i) }; go=0
/* J1: may I join? */
/* never a third: who joins must be the only one beside the one it joins */
#ifdef M_CROWD
#define CROWD(v,i) v=0
#else
#define CROWD(v,i) PICK(v,CNT5(sP[i]&OTHERS(i))>1,CNT5(eP[i]&OTHERS(i))>1)
#endif
#ifdef J1B
#define SUPERSEDED(v,i) PICK(v,(sT[i]&sH[i])!=0,(eT[i]&eH[i])!=0)
#else
#define SUPERSEDED(v,i) CROWD(v,i)
#endif
#ifdef M_NOHAND
#define MAYJOIN(v,i) v=1
#else
#define MAYJOIN(v,i) LOOKHAND(v,i); LOOKFREE(u,i); v=v||u; SUPERSEDED(u,i); v=v&&!u; u=0
#endif
/* the entry: TRY takes it where ENTRYFREE, OWNED ends the way in */
#if defined(SW)
#define ENTRYFREE (entry==0 && readers==0)
#define ENTER(i) entry=i+1
#define LEAVE(i) entry=0
#else
#define ENTRYFREE (owner==0)
#define ENTER(i) owner=i+1
#define LEAVE(i) owner=0
#endif
/* The first look is J1 as well. What it asks after it has seen somebody present is of a later instant: whether he is willing. */
#ifdef M_NOHAND
#define WILLING(v,i) v=1
#else
#define WILLING(v,i) LOOKHAND(v,i); LOOKFREE(u,i); v=v||u; u=0
#endif
#if defined(M_NOHAND)
#define FOUND(i) NOW(i); go=4
#elif defined(M_ONELOOK)
#define FOUND(i) if :: u -> go=0 :: else -> MAYJOIN(t,i); if :: t -> go=5 :: else -> go=0 fi fi; NOW(i)
#else
#define FOUND(i) if :: u -> go=0 :: else -> SUPERSEDED(u,i); if :: u -> go=0 :: else -> go=4 fi fi; NOW(i)
#endif
inline REGISTER(i) {
  d_step { SAY(i,"Register"); r=0; cr=0; go=1; t=0; u=0; ON(alive,i); ON(in,i); UPD; NOW(i) }
  CHILD(i, LOOKOTHERS(t,i); LOOKSTRANGERS(u,i);
    if
    :: t -> FOUND(i)                                   /* 1. and J1 */
    :: !t && u -> go=0                                 /* 2. */
    :: !t && !u && ENTRYFREE -> d_step { SAY(i,"  owner taken"); ENTER(i); UPD; NOW(i) }      /* 3. */
    :: !t && !u && !ENTRYFREE -> NOW(i); go=3
    fi );
  if
  :: go==3 -> CHILD(i, LOOKOTHERS(t,i); LOOKSTRANGERS(u,i);
        if
        :: t -> NOW(i); go=2
        :: !t && !u && ENTRYFREE -> go=1; d_step { SAY(i,"  owner taken"); ENTER(i); UPD; NOW(i) }
        :: !t -> go=0
        fi )
  :: else
  fi;
  if
  :: go==1 ->
#ifdef SW
     CHILD(i, if :: owner==0 -> d_step { SAY(i,"  sharedOwner taken"); owner=i+1; UPD; NOW(i) } :: else -> d_step { SAY(i,"  owner given back"); LEAVE(i); UPD; NOW(i) }; go=2 fi);
     if :: go==1 -> CHILD(i, d_step { SAY(i,"  present up"); ON(pres,i); UPD; NOW(i) }) :: else fi;
#else
     CHILD(i, d_step { SAY(i,"  present up"); ON(pres,i); UPD; NOW(i) });                    /* 4. */
#endif
#ifdef M_REGEARLY
     if :: go==1 -> CHILD(i, d_step { SAY(i,"  new handoff up"); DRAW(i); UPD; NOW(i) }) :: else fi;
#endif
#ifndef M_NOLOOK
     if
     :: go==1 -> CHILD(i, LOOKSTRANGERS(u,i); LOOKOTHERS(t,i);
        if
        :: u -> REFUSE(i)                              /* 5. */
#ifdef SW
        :: !u && t -> d_step { SAY(i,"  sharedOwner given back"); owner=0; UPD; NOW(i) }; d_step { SAY(i,"  owner given back"); LEAVE(i); UPD; NOW(i) }; go=2           /* 6. */
#else
        :: !u && t -> d_step { SAY(i,"  owner given back"); LEAVE(i); UPD; NOW(i) }; go=2           /* 6. */
#endif
        :: else
        fi)
     :: else fi
#endif
#ifdef SW
     ;if :: go==1 -> CHILD(i, d_step { SAY(i,"  owner given back"); LEAVE(i); UPD; NOW(i) }) :: else fi
#endif
#if !defined(M_REGNOHAND) && !defined(M_REGEARLY)
     ;if :: go==1 -> CHILD(i, d_step { SAY(i,"  new handoff up"); DRAW(i); UPD; NOW(i) }) :: else fi      /* 7. */
#endif
  :: else
  fi;
  if
  :: go==2 || go>=4 ->
     CHILD(i, if :: go==2 -> MAYJOIN(t,i) :: go==4 -> WILLING(t,i) :: go==5 -> t=1 fi; if :: t -> d_step { SAY(i,"  present up"); ON(pres,i); UPD; NOW(i) }; go=2 :: else -> REFUSE(i) fi);     /* J1 J2 */
#ifndef M_NOJLOOK
     if
     :: go -> CHILD(i, LOOKSTRANGERS(u,i); if :: u -> t=0 :: else -> MAYJOIN(t,i) fi; if :: t :: else -> REFUSE(i) fi)   /* J3 J4 */
     :: else fi
#endif
#ifdef M_JOINHAND
     ;if :: go -> CHILD(i, d_step { SAY(i,"  new handoff up"); DRAW(i); UPD; NOW(i) }) :: else fi
#endif
  :: else
  fi;
  d_step { GONE(i); if :: go && HAS(alive,i) -> r=go; ON(reg,i); UPD :: else -> r=0; if :: HAS(alive,i) -> DIE(i) :: else fi fi; t=0; u=0; go=0; cr=0 }
}

/* ---- lease::acquireAll, one resource ---- */
#ifdef M_NOTAKEN
#define LOOKTAKEN(v,i) v=0
#else
#define LOOKTAKEN(v,i) PICK(v,(sT[i]&MINE(i))!=0,(eT[i]&MINE(i))!=0)
#endif
#ifdef M_NOTOKEN
#define NAMED(v,i,S) LOOKHAND(v,i)
#else
#define NAMED(v,i,S) PICK(v,HAS(sH[i]&~MINE(i),S),HAS(eH[i]&~MINE(i),S))
#endif
#define ALLOWED(v,i,S) LOOKOTHERS(v,i); \
    if :: !v -> v=1 \
       :: v && S!=0 && S==NOTEDTOK(i) -> LOOKTAKEN(v,i); v=!v \
       :: v && S!=0 && S!=NOTEDTOK(i) -> NAMED(v,i,S) \
       :: else -> v=0 fi
#ifdef M_NOTAKEN
#define WANTED(i,S) 0
#else
#define WANTED(i,S) (BIT(S)&eH[i]&~tk&~MINE(i)&~1)
#endif
#ifdef M_NONOTE
/* owner in hand, noted or not */
#define HAD(i) (owner==i+1)
#else
#define HAD(i) NOTEDOWN(i)
#endif
#ifdef M_TOOK
/* who was alone at the first look does not know whether this call took owner, and keeps it when refused */
#define TOOK(i) u=((eP[i]&OTHERS(i))!=0)
#define GIVEBACK u
#else
#define TOOK(i) skip
#define GIVEBACK true
#endif
#ifdef M_KEEPHAND
#define HIDE(i) skip
#define HANDDOWN(i) skip
#else
#define HIDE(i) NOTEBACK(i)
#define HANDDOWN(i) HANDOFFDOWN(i)
#endif
#ifdef M_LESSNOTE
/* nothing is noted, so nothing is up? */
#define SURE(i) (NOTEDOWN(i) && NOTEDTOK(i)==0 && !NOTEDLEAVE(i))
#else
#define SURE(i) (NOTEDOWN(i) && !SHOWS(i))
#endif
inline ACQUIRE(i,S) {
  BEGIN(i,"Acquire");
  sure=SURE(i);
  if
  :: cr -> skip
  :: !cr && HAD(i) -> r=1             /* 1. noted: it has looked with owner in hand; nothing is asked, and nothing placed */
  :: !cr && !HAD(i) ->
     /* one that no note tells of is not placed once more: it goes first (ceph-fuse; at once, or not at all) */
     if :: owner==i+1 -> d_step { SAY(i,"  owner without a note down"); owner=0; OFF(lo,i); UPD; NOW(i) } :: skip fi;
     if
     :: atomic { (owner==0 || owner==i+1) && HAS(alive,i) -> ALLOWED(t,i,S);                    /* 2. 3. */
           if :: t -> TOOK(i); d_step { SAY(i,"  owner taken"); owner=i+1; ON(lo,i); UPD; NOW(i); r=1; go=1 } :: else fi }
#ifndef LIVE
     :: skip                                            /* not allowed, or the bounded wait is over, or QEMU died */
     :: atomic { CRASH(i) }
#endif
     fi;
#ifndef M_NORELOOK
     if :: r -> atomic { ALLOWED(t,i,S);                /* 4. */
        if :: !t -> d_step { r=0; if :: GIVEBACK -> SAY(i,"  owner given back"); owner=0; OFF(lo,i); UPD; NOW(i) :: else fi } :: t :: CRASH(i) fi } :: else fi;
     assert(r || cr || owner!=i+1 || !go);              /* a refusal keeps nothing that this call took */
#else
     skip
#endif
  fi;
  if :: r ->
     if :: !cr && go && WANTED(i,S)!=0 -> ST(i, "  taken", tkh[i]=tkh[i]|WANTED(i,S)) :: else fi;       /* 5. */
     if :: !cr && !sure -> atomic { if :: CRASH(i) :: d_step { OFF(lo,i); HIDE(i) } fi };             /* 6. the note says owner and nothing else */
        HANDDOWN(i)                                                       /* 7. the guard, then handoff and leaving */
     :: else fi;
     assert(cr || !HAS(alive,i) || !SHOWS(i))                  /* who may run lets nobody join */
  :: else fi;
  go=0; sure=0;
  END(i) }

/* ---- lease::releaseAll, one resource ---- */
#define ASIDE(i) if :: HAS(lt,i) -> assert(old[i]==0); old[i]=mytok[i]; if :: HAS(leave,i) -> ON(ll,i) :: else fi; OFF(lt,i) :: else fi
inline RELEASE(i) {
  BEGIN(i,"Release");
#ifdef M_RELDROPFIRST
  ST(i, "  owner down", if :: owner==i+1 -> owner=0 :: else fi);
#endif
  if :: NOTEDTOK(i)==0 && NOTEDOWN(i) ->               /* a joiner that never ran has nothing to offer */
     /* what no note tells of stays up beside it until the next Acquire or Inquire */
     ST2(i, "  new handoff up", skip, ASIDE(i); DRAW(i); ON(lt,i), OFF(lt,i))
  :: else fi;
#ifdef NOKEEP
  ST(i, "  owner down", if :: owner==i+1 -> owner=0 :: else fi);
#else
  if :: !cr && NOTEDLEAVE(i) && owner==i+1 ->
     atomic { LOOKJOINER(t,i);
        if :: t -> ON(lo,i); if :: d_step { SAY(i,"  owner given back"); owner=0; OFF(lo,i); UPD; NOW(i) } :: CRASH(i) fi :: !t :: CRASH(i) fi }
  :: else fi;
#endif
#ifdef M_DROPPRES
  ST(i, "  present down", OFF(pres,i));
#endif
  if :: !cr && HAS(alive,i) -> st[i]=NOTEDTOK(i) :: else fi;
  END(i) }
/* ---- lease::inquireAll, one resource ---- */
inline INQUIRE(i) {
  BEGIN(i,"Inquire");
  HANDOFFDOWN(i);
  ST(i, "  leaving up", ON(leave,i); ON(lt,i));
  ST2(i, "  new handoff up", skip, DRAW(i); ON(lt,i), OFF(lt,i));
  if :: !cr -> r=1 :: else fi;
  END(i) }

/* ---- libvirt ---- */
#define STOP(i) d_step { if :: HAS(runs,i) -> SAY(i,"stops, drains"); OFF(runs,i); ON(drain,i) :: else fi }
#define OLDER(i) (HAS(alive,0)&&ver[0]>ver[i])||(HAS(alive,1)&&ver[1]>ver[i])||(HAS(alive,2)&&ver[2]>ver[i])
#define RANK(k) (ver[k]==0 -> 0 : 1+(ver[0]<ver[k]&&ver[0]>0)+(ver[1]<ver[k]&&ver[1]>0)+(ver[2]<ver[k]&&ver[2]>0))
#define CONT(i) d_step { if :: HAS(alive,i) -> \
      SAY(i,"runs"); assert(ver[i]>0); assert(!(OLDER(i)));          /* S4: never from RAM older than that of an incarnation that lives */ \
      ON(runs,i); OFF(drain,i); WR(i); ver[i]=9; r0=RANK(0); r1=RANK(1); r2=RANK(2); ver[0]=r0; ver[1]=r1; ver[2]=r2; r0=0; r1=0; r2=0 :: else fi }
inline RESUME(i) { ACQUIRE(i,st[i]); if :: r -> if :: st[i]=0; CONT(i) :: atomic { ncr>0 -> ncr--; if :: st[i]=0 :: skip fi } fi :: else fi }

#ifdef LIVE
bool moving;
#define MAYMIGRATE !moving
#define MOVING(x) moving=x
#else
#define MAYMIGRATE true
#define MOVING(x) skip
#endif
#define LOCALS byte r,t,u,go,d,r0,r1,r2; bool cr,sure; short m
byte lost;                  /* nobody waits for this slot's answer to Finish */
#define ANSWER(i,x) cmd[i]=(HAS(lost,i) -> idle : x); OFF(lost,i); OFF(inc,i); jS[i]=0
#define IDLE(k) (!HAS(alive,k) && !HAS(dying,k) && !HAS(dup,k) && cmd[k]==idle)
#define KILLED(i) if :: HAS(alive,i) -> DIE(i) :: else fi

proctype Host(byte i) { LOCALS; bool live;
  end: do
  /* a user */
  :: atomic { nop>0 && HAS(runs,i) -> nop--; SAY(i,"USER SUSPENDS") }; STOP(i); RELEASE(i);
#ifndef REL1
     if :: RELEASE(i) :: skip fi
#endif
  :: atomic { nop>0 && HAS(reg,i) && !HAS(inc,i) && !HAS(runs,i) && !HAS(drain,i) -> nop--; SAY(i,"USER RESUMES") }; RESUME(i)
  /* the destination's side of a migration */
  :: cmd[i]==prepare -> REGISTER(i);
#ifdef LIVE
     assert(r);
#endif
     d_step { if :: r -> ON(inc,i); cmd[i]=prepared :: else -> cmd[i]=failed fi }
  :: d_step { cmd[i]==kill -> KILLED(i); OFF(inc,i); jS[i]=0; st[i]=0; cmd[i]=idle }
  :: d_step { cmd[i]==finishPaused -> if :: HAS(alive,i) -> st[i]=jS[i]; ANSWER(i,done) :: else -> ANSWER(i,failed) fi }
  :: cmd[i]==finish -> ACQUIRE(i,jS[i]);
     if
     :: r -> CONT(i); d_step { st[i]=0; ANSWER(i,done) }
     :: d_step { !r -> KILLED(i); ANSWER(i,failed) }
     :: atomic { !r && cr && HAS(alive,i) -> SAY(i,"left paused"); if :: st[i]=jS[i] :: skip fi; ANSWER(i,failed) }     /* libvirtd died in Finish: the guest may be left paused */
     fi
  /* the source's side */
  :: atomic { nmig>0 && MAYMIGRATE && (IDLE(0)||IDLE(1)||IDLE(2)) && HAS(reg,i) && HAS(alive,i) && !HAS(inc,i) && !HAS(drain,i) ->
        d=(IDLE(0) -> 0 : (IDLE(1) -> 1 : 2));
        nmig--; MOVING(1); SAY(i,"MIGRATES"); live=HAS(runs,i) };
     if :: live -> INQUIRE(i); if :: r -> jS[i]=mytok[i] :: else -> goto off fi :: else -> jS[i]=st[i] fi;
     atomic { if :: IDLE(d) -> cmd[d]=prepare :: else -> goto off fi };
     (cmd[d]==prepared || cmd[d]==failed);
     if :: atomic { cmd[d]==failed -> cmd[d]=idle; goto off } :: else fi;
#ifndef LIVE
     if :: atomic { cmd[d]=kill; goto off } :: skip fi;                  /* aborted */
#endif
     if :: HAS(runs,i) -> STOP(i); RELEASE(i); if :: atomic { cr -> cmd[d]=kill; goto off } :: else fi :: else fi;
     if
     :: atomic { HAS(alive,i) && !HAS(drain,i) -> SAY(i,"sends RAM"); if :: HAS(alive,d) -> ver[d]=ver[i] :: else fi; jS[d]=jS[i];
           if :: live -> cmd[d]=finish
#ifdef LIVE
              :: !live -> cmd[d]=finishPaused
#else
              :: cmd[d]=finishPaused           /* suspended before or meanwhile */
#endif
           fi }
     :: atomic { !HAS(alive,i) -> cmd[d]=kill; goto off }
     fi;
     if
     :: atomic { cmd[d]==done -> cmd[d]=idle; if :: d_step { KILLED(i) }
#ifndef LIVE
                                  :: SAY(i,"CONFIRM LOST")                       /* Confirm is lost */
#endif
                    fi }
     :: atomic { cmd[d]==failed -> cmd[d]=idle };
#ifdef LIVE
        assert(0);
#endif
        if :: HAS(alive,i) -> RESUME(i) :: else fi
#ifndef LIVE
     :: d_step { SAY(i,"CONNECTION LOST"); if :: cmd[d]==done || cmd[d]==failed -> cmd[d]=idle :: else -> ON(lost,d) fi };   /* the connection is lost: both are on their own */
        if :: HAS(alive,i) -> RESUME(i) :: skip fi
#endif
     fi;
off: skip; d_step { MOVING(0); jS[i]=0; d=0; live=0; r=0; cr=0; if :: HAS(alive,i) -> skip :: else -> st[i]=0 fi }
  :: d_step { !HAS(alive,i) && st[i]!=0 && !HAS(dup,i) -> st[i]=0 }
  od }

/* QEMU's writes that were under way at `stop` end some time later */
proctype Drain() { end: do :: d_step { HAS(drain,0) -> OFF(drain,0); OFF(w,0) } :: d_step { HAS(drain,1) -> OFF(drain,1); OFF(w,1) } :: d_step { HAS(drain,2) -> OFF(drain,2); OFF(w,2) } od }
proctype Killer() { end: do
  :: d_step { nk>0 && HAS(alive,0) -> nk--; DIE(0) } :: d_step { nk>0 && HAS(alive,1) -> nk--; DIE(1) } :: d_step { nk>0 && HAS(alive,2) -> nk--; DIE(2) } od }

#ifdef FILESET
/* the vessel of a dead QEMU is torn down descriptor by descriptor, in any order */
#define REAP(k) :: d_step { HAS(dying,k) && owner==k+1 -> owner=0; UPD } :: d_step { HAS(dying,k) && HAS(pres,k) -> OFF(pres,k); UPD } \
  :: d_step { HAS(dying,k) && mytok[k]!=0 -> mytok[k]=0; UPD } :: d_step { HAS(dying,k) && old[k]!=0 -> old[k]=0; UPD } :: d_step { HAS(dying,k) && (HAS(leave,k) || tkh[k]!=0) -> OFF(leave,k); tkh[k]=0; UPD } \
  :: d_step { HAS(dying,k) && owner!=k+1 && !HAS(pres,k) && mytok[k]==0 && old[k]==0 && !HAS(leave,k) && tkh[k]==0 -> OFF(dying,k); UPD }
proctype Reaper() { end: do
  REAP(0) REAP(1) REAP(2) REAP(3)
  od }
#endif
#ifdef NR
/* A destination that has no RAM yet may have joined a rogue that came when all were dead; nobody can send it any. */
#define HASRAM ((ver[0]>0)|((ver[1]>0)<<1)|((ver[2]>0)<<2))
byte nr=NR;
proctype Rogue() { LOCALS; byte s;
  end: do
  :: nr>0 -> nr--;
     REGISTER(3);
     if
     :: r==0
     :: r>0 -> 
#ifdef GUARD
        if :: r==2 -> d_step { KILLED(3) } :: else fi;
#endif
#ifdef META
        d_step { if :: HAS(alive,3) -> WR(3) :: else fi };              /* a cold qcow2 may be written to at once */
#endif
        if :: s=0 :: s=STALE fi;
        if :: HAS(alive,3) -> ACQUIRE(3,s); if :: r -> d_step { if :: HAS(alive,3) -> assert((reg&alive&HASRAM)==0); WR(3) :: else fi } :: else fi    /* S3 */
           :: skip fi;                                                   /* started paused */
        d_step { s=0; KILLED(3) }
     fi
  od }
#endif
#ifdef NE
byte ne=NE;
/* lease::registerAll of another domain, in any mode; D's mode is incompatible with it, or the same. Beside an exclusive D a
 * reader takes the same steps as a writer: what it asks for is D's present marks, and its owner for reading keeps D's out. */
#ifdef SW
#define FREEFORE (emode==2 -> entry==0 : ENTRYFREE)
#define EENTER if :: emode==2 -> ON(readers,E) :: else -> entry=E+1 fi
#define EBAD (emode!=1)
#define EMODES if :: emode=0 :: emode=1 :: emode=2 fi
#else
#define FREEFORE owner==0
#define EENTER owner=E+1
#define EBAD true
#define EMODES skip
#endif
#define ENOW eP[E]=CURP; sP[E]=CURP
proctype Stranger() { bool t,go;
  end: do
  :: ne>0 -> ne--;
     EMODES;
     d_step { ON(alive,E); ON(in,E); ENOW; go=0 };
     atomic { PICK(t,(sP[E]&DMASK)!=0&&EBAD,(eP[E]&DMASK)!=0&&EBAD); if :: !t && FREEFORE -> d_step { go=1; EENTER; UPD; ENOW } :: else fi };
     if
     :: go -> d_step { ON(pres,E); UPD; ENOW };
        atomic { PICK(t,(sP[E]&DMASK)!=0&&EBAD,(eP[E]&DMASK)!=0&&EBAD); if :: !t -> assert(!EBAD || (reg&alive&DMASK)==0); ON(reg,E) :: else fi };   /* S2 */
        if :: !t && emode==1 -> d_step { entry=0; UPD } :: !t && EBAD -> d_step { WR(E) } :: else fi;
#ifdef COLD
        if :: owner==E+1 && !t -> d_step { owner=0; UPD }     /* it is migrating: present without owner */ :: else fi
#endif
     :: else
     fi;
     d_step { t=0; go=0; OFF(in,E); eP[E]=0; sP[E]=0; OFF(alive,E); OFF(reg,E); OFF(w,E); OFF(pres,E); OFF(readers,E); emode=0;
        if :: owner==E+1 -> owner=0 :: else fi; if :: entry==E+1 -> entry=0 :: else fi; UPD }
  od }
#endif
#ifdef COLD
/* COLD hosts start the same domain at the same time: exactly one wins (a QEMU that merely joined dies of the guard) */
byte won, finished;
proctype Cold(byte i) { LOCALS;
  REGISTER(i);
#ifdef GUARD
  if :: r==2 -> d_step { KILLED(i); r=0 } :: else fi;
#endif
  if :: r -> ACQUIRE(i,0) :: else fi;
  d_step { if :: r && HAS(alive,i) -> won++; assert(!HAS(w,E)); WR(i) :: else fi; r=0; finished++ }
}
init { atomic { run Cold(0); run Cold(1);
#if COLD>2
    run Cold(2);
#endif
#ifdef NE
    run Stranger();
#endif
    run Killer();
    skip };
  (finished==COLD);
#ifdef NE
    assert(won<=1)
#else
    assert(won==1 || nk<NK)
#endif
  }
#else
/* A runs, or was started paused and Register was all that has happened */
#ifdef M_REGNOHAND
#define PAUSED skip
#else
#define PAUSED mytok[0]=1; hd=BIT(1)
#endif
#ifdef NEVER
#define BEGUN PAUSED
#elif defined(RAN)
#define BEGUN runs=1; w=1
#else
#define BEGUN if :: PAUSED :: runs=1; w=1 fi
#endif
init { atomic { alive=1; reg=1; pres=1; owner=1; ver[0]=1; BEGUN; run Host(0); run Host(1); run Host(2); run Drain(); run Killer();
#ifdef NR
  run Rogue();
#endif
#ifdef FILESET
  run Reaper();
#endif
#ifdef NE
  run Stranger();
#endif
  skip } }
#endif
