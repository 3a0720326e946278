/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */
/* A lease file with byte-range marks in a lockspace: opened (and made) by name, swept by whoever has given it up
 * (openLeaseFile, registerAll, isListed, sweepLease). Guests 0 and 1 are of one domain, 2 of another; each enters and
 * detaches. SHARED: all in shared mode, where `owner` is held only while one enters. STRANGER: in the place of guest 1
 * somebody who makes a lease of his own and sweeps those of others meanwhile (sweepSome). NK: deaths. Nobody may hold a
 * lease through a file that has lost its name: the next one would make another file and have the lease as well. */
#ifndef NK
#define NK 0
#endif
#define NI 4              /* one more than are ever made */
#define BIT(k) (1<<(k))
#define OTHERS (7&~BIT(i))
#define PEERS ((i==2 -> 0 : 3)&~BIT(i))

byte name, made;              /* the inode that has the name (0 none); inodes made so far */
byte ino[4];                  /* which one a guest, or the stranger, has open */
byte owner[NI], dom[NI], dom2[NI]; /* guest+1: owner; sharedOwner of domain 1 (guests 0 and 1), of domain 2 */
byte pres[NI], hand[NI];      /* present, handoff: a bit a guest */
byte has;                     /* who was told that the lease is his */
byte nk=NK, done;

#define CHECK assert(!(has&1) || ino[0]==name); assert(!(has&2) || ino[1]==name); assert(!(has&4) || ino[2]==name)
#define X ino[i]
#define CLEAR pres[X]=pres[X]&~BIT(i); hand[X]=hand[X]&~BIT(i); if :: owner[X]==i+1 -> owner[X]=0 :: else fi; \
  if :: dom[X]==i+1 -> dom[X]=0 :: else fi; if :: dom2[X]==i+1 -> dom2[X]=0 :: else fi
#define S(x) if :: d_step { x; CHECK } :: d_step { nk>0 -> nk-- } -> goto dead fi
#ifdef SHARED
#define RIVAL 0               /* strangers are compatible */
#define OWNBUSY (i==2 -> dom2[X]!=0&&dom2[X]!=i+1 : dom[X]!=0&&dom[X]!=i+1)
#else
#define RIVAL (OTHERS&~PEERS)
#define OWNBUSY (owner[X]!=0&&owner[X]!=i+1)
#endif
#define ENTRYBUSY (owner[X]!=0&&owner[X]!=i+1)
#ifdef M_ENTRY
#define BUSY OWNBUSY
#else
#define BUSY (OWNBUSY || ENTRYBUSY)
#endif

/* Medium::look: each mark is read at an instant of its own */
inline LOOK() {
  p=0; h=0; b=0; o=0; left=7;
  do
  :: left&1 -> S(p=pres[X]&OTHERS); left=left&~1
  :: left&2 -> S(h=hand[X]&PEERS); left=left&~2
  :: left&4 -> S(b=BUSY; o=ENTRYBUSY||OWNBUSY); left=left&~4
  :: left==0 -> break
  od }
inline MAYJOIN() {
  LOOK();
  if
  :: (p&RIVAL)!=0 || (h==0 && b) || (p&PEERS&((p&PEERS)-1))!=0 -> goto refused
  :: else
  fi }

proctype Guest(byte i) { byte p, h, left; bool b, o, joined, late;
  S(if :: name==0 -> made++; name=made :: else fi; X=name);         /* O_CREAT */
#ifdef M_EARLY
  S(late=(X!=name));
#endif
  LOOK();
  if :: (p&RIVAL)!=0 -> goto refused :: else fi;
  joined=((p&PEERS)!=0);
  if
  :: !joined ->
     /* tried again for a while; one retry is enough, it may come as late as it likes */
     S(b=(owner[X]==0); if :: b -> owner[X]=i+1 :: else fi);
     if
     :: b
     :: else ->
        LOOK();
        if :: (p&RIVAL)!=0 -> goto refused :: (p&RIVAL)==0 && (p&PEERS)!=0 -> joined=1
           :: (p&RIVAL)==0 && (p&PEERS)==0 -> S(b=(owner[X]==0); if :: b -> owner[X]=i+1 :: else fi); if :: !b -> goto refused :: else fi fi
     fi
  :: else
  fi;
#ifdef SHARED
  if
  :: !joined -> S(if :: i==2 -> b=(dom2[X]==0); if :: b -> dom2[X]=i+1 :: else fi :: else -> b=(dom[X]==0); if :: b -> dom[X]=i+1 :: else fi fi);
     if :: !b -> S(owner[X]=0); joined=1 :: else fi
  :: else
  fi;
#endif
  if
  :: !joined ->
     S(pres[X]=pres[X]|BIT(i));
     LOOK();
     if :: (p&RIVAL)!=0 -> goto refused :: else fi;
     if
     :: (p&PEERS)!=0 -> joined=1;
#ifdef SHARED
        S(if :: i==2 -> dom2[X]=0 :: else -> dom[X]=0 fi)
#else
        S(owner[X]=0)
#endif
     :: else
     fi;
#ifdef SHARED
     S(owner[X]=0)
#endif
  :: else
  fi;
  if :: joined -> MAYJOIN(); S(pres[X]=pres[X]|BIT(i)); MAYJOIN() :: else fi;
#if !defined(M_EARLY) && !defined(M_NOLISTED)
  S(late=(X!=name));                                                /* isListed */
#endif
  if :: late -> goto refused :: else fi;
  S(has=has|BIT(i));
  if :: S(hand[X]=hand[X]|BIT(i)) :: skip fi;                       /* suspended, perhaps */
  /* detach, and the sweeper: libvirtd, on the guest's own description */
  S(has=has&~BIT(i));
  S(CLEAR);
#ifndef M_NOOWNER
  S(b=(owner[X]==0); if :: b -> owner[X]=i+1 :: else fi);
  if :: !b -> goto refused :: else fi;
#endif
#ifndef M_SWEEPBLIND
  LOOK();
  if :: p!=0 || h!=0 || o -> goto refused :: else fi;
#endif
#ifdef M_EARLYUNLOCK
  S(owner[X]=0);
#endif
#ifndef M_BYNAME
  S(late=(name!=X));
  if :: late -> goto refused :: else fi;
#endif
  S(name=0);
refused: skip;
dead: skip;
  d_step { CLEAR; has=has&~BIT(i); X=0; p=0; h=0; b=0; o=0; left=0; late=0; joined=0; CHECK };
  done++ }

#ifdef STRANGER
#define SECOND Stranger(3)
proctype Stranger(byte i) { byte p, h, left; bool b, o, joined, late;
  S(X=name);
  if :: X==0 -> goto refused :: else fi;
  LOOK();
  if :: p!=0 || h!=0 || b || o -> goto refused :: else fi;
#ifndef M_NOOWNER
  S(b=(owner[X]==0); if :: b -> owner[X]=i+1 :: else fi);
  if :: !b -> goto refused :: else fi;
#endif
#ifndef M_SWEEPBLIND
  LOOK();
  if :: p!=0 || h!=0 || o -> goto refused :: else fi;
#endif
  S(late=(name!=X));
  if :: late -> goto refused :: else fi;
  S(name=0);
refused: skip;
dead: skip;
  d_step { if :: X!=0 && owner[X]==i+1 -> owner[X]=0 :: else fi; X=0; p=0; h=0; b=0; o=0; left=0; late=0; CHECK };
  done++ }
#else
#define SECOND Guest(1)
#endif

init { atomic { run Guest(0); run SECOND; run Guest(2) } done==3 }
