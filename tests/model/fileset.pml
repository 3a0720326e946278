/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors */
/* The file set, system call by system call, against what the protocol's models assume of a medium: every call is one
 * atomic step for everybody, marks go with their incarnation, a mark that stays up is always seen.
 *
 * A slot is an incarnation: first a child that makes the file and becomes QEMU, then a QEMU on whose behalf one libvirtd
 * after the other acts. NC: these die before any system call (a child takes the marks along, a libvirtd does not).
 * NK: QEMUs die, their descriptors go one by one. NOP: operations of each slot. IMAGE: owner flocks the image too.
 * CONV: owner changes its type (downgrade, upgrade). NS: times somebody uses flock(1) on the image. NL: times a slot
 * attaches. INDEX: many are there, so there is an index. OLD: each call may be made by a version that knows of none.
 * SWEEPER: a process that only looks. STRICT: whoever has owner has the image's flock whenever the gate is not
 * his. FOREIGN: an image that is busy while no mark says why is in the hands of flock(1). */
#ifndef N
#define N 2
#endif
#ifndef NOP
#define NOP 3
#endif
#ifndef NC
#define NC 0
#endif
#ifndef NK
#define NK 0
#endif
#ifndef NS
#define NS 0
#endif
#ifndef NL
#define NL 1
#endif
#define BIT(k) (1<<(k))
#define P 1                /* the text of a file: present, owner for writing, owner for reading */
#define W 2
#define R 4
#define OWNER (W|R)
#define MAX 3              /* slots 0..2; 3 is the sweeper */

bool nm[MAX], fl[MAX];     /* the file of a slot has its name, is flocked */
byte tx[MAX];
byte fd[MAX], fdi[MAX];    /* who has the description of the file, of the image: 1 QEMU, 2 child or libvirtd */
byte gate, trial[MAX];     /* process+1 that holds the gate; that tries the file (read lock) */
byte ex, sh, stray;        /* the image's flock: slot+1 for writing, slots for reading; flock(1): 1 reads, 2 writes */
bool q[MAX], busy[4];      /* QEMU lives; a process acts */
bool lost[MAX];            /* a conversion of the image's flock may have lost it */
bool ix, line[MAX], readers; /* the index: who may be more than a reader; whether there may be readers */
byte nc=NC, nk=NK, ns=NS, done;
bool odd;                  /* somebody died, or flock(1) was there: the image alone may be busy */
short must[4], may[4];     /* what is up during a whole call, at some time of it; 3 bits a slot */

#define UPK(k) (fl[k]*tx[k])
#define UP (UPK(0)|(UPK(1)<<3)|(UPK(2)<<6))
#define SEE(p) if :: busy[p] -> must[p]=must[p]&UP; may[p]=may[p]|UP :: else fi
#define OWNS(k) ((UPK(k)&OWNER)!=0)
#define WRITES(k) ((UPK(k)&W)!=0)
#define NOWNERS (OWNS(0)+OWNS(1)+OWNS(2))
#ifdef IMAGE
#ifdef STRICT
#define EXCUSED(k) (lost[k] && gate==k+1)
#else
#define EXCUSED(k) lost[k]
#endif
#define IMG(k) assert(!OWNS(k) || EXCUSED(k) || fdi[k]==0 || ex==k+1 || (!WRITES(k) && (sh&BIT(k))))
#else
#define IMG(k) skip
#endif
/* after every step */
#define CHECK SEE(0); SEE(1); SEE(2); SEE(3); \
  assert(!((WRITES(0)||WRITES(1)||WRITES(2)) && NOWNERS>1));                       /* owner excludes owner */ \
  assert(!(UPK(0)&&!nm[0]) && !(UPK(1)&&!nm[1]) && !(UPK(2)&&!nm[2]));             /* what is up is listed */ \
  assert(gate==0 || busy[gate-1]);                                                 /* the gate goes with its process */ \
  IMG(0); IMG(1); IMG(2)

#define DROPFILE(k,who) fd[k]=fd[k]&~who; if :: fd[k]==0 -> fl[k]=0 :: else fi
#define UNFLOCK(k) if :: ex==k+1 -> ex=0 :: else fi; sh=sh&~BIT(k)
#define DROPIMAGE(k,who) fdi[k]=fdi[k]&~who; if :: fdi[k]==0 -> UNFLOCK(k) :: else fi

/* a system call, or death before it */
#define S(x) if :: d_step { x; CHECK } :: d_step { nc>0 -> nc--; odd=1 } -> goto dead fi
#ifdef M_NOGATE
#define ENTER skip
#define LEAVE skip
#else
#define ENTER if :: d_step { gate==0 -> gate=i+1; CHECK } :: d_step { nc>0 -> nc--; odd=1 } -> goto dead fi
#define LEAVE S(if :: gate==i+1 -> gate=0 :: else fi)
#endif

/* readOthers: one file, into `got` */
inline LOOKAT(k) {
  S(t=nm[k]);
  if
  :: t && k!=i ->
#ifdef M_NOTRIAL
     S(got=got|(tx[k]<<(3*k)))
#else
     S(t=fl[k]; if :: !t -> trial[k]=i+1 :: else fi);
     if
     :: t -> S(got=got|(tx[k]<<(3*k)))
     :: else -> S(nm[k]=0); S(trial[k]=0)
#ifdef INDEX
        ; if :: old -> skip :: else -> S(line[k]=0) fi
#endif
     fi
#endif
  :: else
  fi }
#if N==3
#define LOOKATALL LOOKAT(0); LOOKAT(1); LOOKAT(2)
#else
#define LOOKATALL LOOKAT(0); LOOKAT(1)
#endif
/* to a version that does not know it the index is the file of a dead one, swept sooner or later */
#ifdef M_IXKEPT
#define SWEEPINDEX skip
#else
#define SWEEPINDEX S(ix=0)
#endif
#ifdef OLD
#define READOTHERS got=0; \
  if :: old -> if :: SWEEPINDEX; LOOKATALL :: LOOKATALL; SWEEPINDEX fi :: else -> LOOKATALL fi
#else
#define READOTHERS got=0; LOOKATALL
#endif
#define MORE(x) (((x)&W)!=0 || ((x)&OWNER)==0 && (x)!=0)   /* than a reader: its own mark decides, or nothing tells */
#define LINEOF(k) MORE((got>>(3*k))&7)
#define READERIN(k) (((got>>(3*k))&R)!=0)
/* tryPlace: who may be in the way; with an index only those, if no reader is */
inline READRIVALS(w) {
#ifdef INDEX
  S(t=ix && !old && !(w==W && readers));
  if
  :: t -> got=0;
     if :: line[0] -> LOOKAT(0) :: else fi;
     if :: line[1] -> LOOKAT(1) :: else fi;
     if :: line[2] -> LOOKAT(2) :: else fi;
     whole=0
  :: else -> READOTHERS; whole=!old
  fi
#else
  READOTHERS
#endif
}
/* how we stand, while the text is x or was tx[i]: told before and after */
#ifdef M_IXLATE
#define STANDS(x) line[i]=MORE(tx[i]); readers=(readers||(tx[i]&R)!=0)
#elif defined(M_IXNOREADERS)
#define STANDS(x) line[i]=(MORE(x)||MORE(tx[i]))
#else
#define STANDS(x) line[i]=(MORE(x)||MORE(tx[i])); readers=(readers||((x)&R)!=0||(tx[i]&R)!=0)
#endif
#if !defined(INDEX)
#define TELL(x) skip
#else
#define TELL(x) if \
  :: old -> skip \
  :: !old && whole -> S(line[0]=LINEOF(0); line[1]=LINEOF(1); line[2]=LINEOF(2); readers=(READERIN(0)||READERIN(1)||READERIN(2)); \
     STANDS(x); ix=1) \
  :: !old && !whole -> S(if :: ix -> STANDS(x) :: else fi) fi
#endif
#ifdef INDEX
#ifdef M_IXEARLY
#define TELLAFTER skip
#define TELLDROP(x) S(if :: ix && !old -> line[i]=MORE(x) :: else fi)
#else
#define TELLAFTER if :: old -> skip :: else -> S(if :: ix -> line[i]=MORE(tx[i]) :: else fi) fi
#define TELLDROP(x) skip
#endif
#else
#define TELLAFTER skip
#define TELLDROP(x) skip
#endif
#define GOTW ((got&(W|(W<<3)|(W<<6)))!=0)
#define GOTR ((got&(R|(R<<3)|(R<<6)))!=0)
#define ANYW(m) ((m&((W|(W<<3)|(W<<6))&~(7<<(3*i))))!=0)
#define ANYO(m) ((m&((OWNER|(OWNER<<3)|(OWNER<<6))&~(7<<(3*i))))!=0)

/* flock(2) on the image; a conversion lets go first */
#define CANEX ((ex==0||ex==i+1) && (sh&~BIT(i))==0 && stray==0)
#define CANSH ((ex==0||ex==i+1) && stray!=2)
#define HAS(w) ((w==W && ex==i+1) || (w==R && (sh&BIT(i))))
#define HASOTHER(w) ((w==R && ex==i+1) || (w==W && (sh&BIT(i))))
#define TRYIMAGE(w) if :: w==W -> ok=CANEX; if :: ok -> ex=i+1 :: else fi :: else -> ok=CANSH; if :: ok -> sh=sh|BIT(i) :: else fi fi
inline FLOCKIMAGE(w) {
  if
  :: HASOTHER(w) -> S(UNFLOCK(i); lost[i]=OWNS(i)); S(TRYIMAGE(w))
  :: HAS(w) -> S(ok=1)
  :: else -> S(TRYIMAGE(w))
  fi }

#define WRITE(x) S(tx[i]=x)
inline PLACEOWNER(w) {
  READRIVALS(w);
  ok=!(GOTW || (w==W && GOTR));
  assert(ok || ANYW(may[i]) || (w==W && ANYO(may[i])));       /* who refuses was there */
  assert(!ok || !(ANYW(must[i]) || (w==W && ANYO(must[i])))); /* who was there refuses */
  if
  :: ok ->
#ifdef M_TEXTFIRST
     WRITE(((tx[i]&P)|w));
#endif
#ifdef IMAGE
     FLOCKIMAGE(w);
#endif
     if
     :: ok -> TELL(((tx[i]&P)|w)); S(tx[i]=(tx[i]&P)|w; lost[i]=0); TELLAFTER
     :: else ->
        assert(odd);
#ifdef FOREIGN
        assert(ns<NS);                                        /* flock(1) has been there */
#endif
#ifdef M_TEXTFIRST
        WRITE((tx[i]&P));
#endif
        if
        :: (tx[i]&OWNER)!=0 -> S(TRYIMAGE(R); if :: ok && (tx[i]&W)==0 -> lost[i]=0 :: else fi)
        :: else
        fi
     fi
  :: else
  fi }

#define BEGIN d_step { busy[i]=1; must[i]=UP; may[i]=UP }
#define END d_step { busy[i]=0; must[i]=0; may[i]=0; got=0; t=0; ok=0 }

#define TRIES (trial[0]==i+1 || trial[1]==i+1 || trial[2]==i+1)
#define UNTRY d_step { TRIES -> if :: trial[0]==i+1 -> trial[0]=0 :: else fi; if :: trial[1]==i+1 -> trial[1]=0 :: else fi; if :: trial[2]==i+1 -> trial[2]=0 :: else fi }
#ifdef M_SHAREDGATE
#define DIED (fd[i]&2)==0 && (fdi[i]&2)==0 && !TRIES
#else
#define DIED gate!=i+1 && (fd[i]&2)==0 && (fdi[i]&2)==0 && !TRIES
#endif

proctype Slot(byte i) {
  short got; bool t, ok, whole, old; byte ops, lives; bool child=1;
again: skip;
  BEGIN;
  /* openMarkFile */
  ENTER;
#ifdef M_EXCL
  S(t=nm[i]; assert(!t); fd[i]=fd[i]|2; nm[i]=1);
#else
  S(fd[i]=fd[i]|2; if :: !nm[i] -> nm[i]=1; tx[i]=0 :: else fi);   /* O_CREAT: a new file, or one's own dead one */
#endif
#ifdef M_EARLYGATE
  LEAVE;
#endif
  S(t=(trial[i]==0 && !fl[i]); fl[i]=fl[i]||t);
  assert(t || odd);                                                 /* busy only while one that died closes its own */
  if :: t :: else -> goto dead fi;
  WRITE(0);
#ifndef M_EARLYGATE
  LEAVE;
#endif
  S(fdi[i]=fdi[i]|2);
  goto inside;
next: skip;
  /* a libvirtd takes duplicates out of the vessel */
  if
  :: d_step { q[i] && ops<NOP && fd[i]==1 && fdi[i]==1 -> busy[i]=1; must[i]=UP; may[i]=UP; fd[i]=3; fdi[i]=3 }
  :: q[i] && fd[i]==0 && lives+1<NL -> lives++; goto again
  :: ops==NOP || !q[i] || fd[i]==0 -> goto fin
  fi;
inside:
  ops++;
#ifdef OLD
  if :: old=1 :: old=0 fi;
#endif
  ENTER;
  S(t=nm[i]);
#ifndef M_NONLINK
  assert(t);                                                        /* nobody has swept the file of a living one */
#endif
  if
  :: (tx[i]&W)==0 -> PLACEOWNER(W)
#ifdef CONV
  :: (tx[i]&R)==0 -> PLACEOWNER(R)
#endif
  :: (tx[i]&P)==0 -> if :: old -> READOTHERS :: else fi; whole=0; TELL((tx[i]|P)); WRITE((tx[i]|P)); TELLAFTER
  :: (tx[i]&OWNER)!=0 ->
#ifdef M_IMAGEFIRST
     S(UNFLOCK(i)); WRITE((tx[i]&P))
#else
     TELLDROP((tx[i]&P)); WRITE((tx[i]&P)); TELLAFTER; S(UNFLOCK(i); lost[i]=0)
#endif
  :: READOTHERS; assert((must[i]&~got&~(7<<(3*i)))==0 && (got&~may[i])==0)
  :: q[i] && !child && lives+1<NL -> lives++; ops=0;                /* detach, and attach again: the same incarnation */
     S(DROPFILE(i,1); DROPIMAGE(i,1)); WRITE(0); TELLAFTER; S(UNFLOCK(i); lost[i]=0); LEAVE;
     d_step { DROPFILE(i,2); DROPIMAGE(i,2); CHECK };
     END; goto again
  fi;
  LEAVE;
  d_step {
    if
    :: child -> q[i]=1; child=0; fd[i]=1; fdi[i]=1           /* becomes QEMU */
    :: else ->
       if :: q[i] -> fd[i]=fd[i]|1; fdi[i]=fdi[i]|1 :: else fi; /* an attach plants what it has made */
       DROPFILE(i,2); DROPIMAGE(i,2)
    fi;
    CHECK };
  END; goto next;
dead: skip;
  whole=0;
  /* the descriptors of a process that dies, in any order */
  do
#ifndef M_SHAREDGATE
  :: d_step { gate==i+1 -> gate=0 }
#endif
  :: d_step { (fd[i]&2)!=0 -> DROPFILE(i,2) }
  :: d_step { (fdi[i]&2)!=0 -> DROPIMAGE(i,2) }
  :: UNTRY
  :: DIED -> break
  od;
  skip;
  END;
  d_step { CHECK };
  if :: child -> skip :: else -> goto next fi;
fin:
  done++
}

proctype Kernel() { byte k;   /* QEMUs die */
  end: do
  :: nk>0 -> select(k:0..2);
     if
     :: d_step { q[k] -> nk--; q[k]=0; odd=1 } ->
        if
        :: d_step { DROPFILE(k,1); CHECK }; d_step { DROPIMAGE(k,1); CHECK }
        :: d_step { DROPIMAGE(k,1); CHECK }; d_step { DROPFILE(k,1); CHECK }
        fi
     :: else
     fi
  od }

proctype Flock() {            /* flock(1) */
  end: do
  :: d_step { ns>0 && stray==0 && ex==0 -> ns--; odd=1; stray=1 }
  :: d_step { ns>0 && stray==0 && ex==0 && sh==0 -> ns--; odd=1; stray=2 }
  :: d_step { stray!=0 -> stray=0 }
  od }

#ifdef SWEEPER
proctype Sweeper() { byte i=3; short got; bool t, ok, old; byte n;
  do
  :: n<2 -> n++; BEGIN;
#ifdef M_SWEEP
     READOTHERS;
#else
     ENTER; READOTHERS; LEAVE;
     assert((must[i]&~got)==0 && (got&~may[i])==0);
#endif
     END
  :: break
  od;
dead: skip;
  do :: d_step { gate==i+1 -> gate=0 } :: UNTRY :: gate!=i+1 && !TRIES -> break od;
  skip;
  END }
#endif

init {
  atomic {
    run Slot(0); run Slot(1);
#if N==3
    run Slot(2);
#endif
#if NK>0
    run Kernel();
#endif
#if NS>0
    run Flock();
#endif
#ifdef SWEEPER
    run Sweeper();
#endif
  }
  done==N;
  assert(gate==0 || busy[3]);
  assert(q[0]||q[1]||q[2]||nk!=NK||(UP==0 && ex==0 && sh==0)) }   /* all dead: nothing is left that refuses a start */
