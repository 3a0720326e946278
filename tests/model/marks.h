/* SPDX-License-Identifier: LGPL-2.1-or-later
 * SPDX-FileCopyrightText: The leasehold authors
 *
 * The marks of ONE resource, who may see them, and what an enumeration of them can return.
 *
 * Slots 0..2 are incarnations (QEMU processes) of domain D; a slot whose QEMU died may be used for a new one.
 * Slot 3 is a rogue: a cold start of the same domain on another host. Slot 4 is a stranger: another domain.
 *
 * A look (Medium::look) is not one instant: it asks range after range. So between two changes that a call makes itself,
 * every mark of others that was up all the time MUST be found, one that was up some of the time MAY be found, and each
 * independently of the others. s* collect "all the time" (stable), e* "some of the time" (ever), since the call's last step.
 */
#define BIT(k) (1<<(k))
#define HAS(m,k) (((m)>>(k))&1)
#define ON(m,k) m=m|BIT(k)
#define OFF(m,k) m=m&~BIT(k)
#define DMASK 15          /* slots of domain D */
#define R 3
#define E 4
#define FREEBIT 128       /* "owner is free", looked at like a mark */

byte owner;               /* 0 free, else slot+1 */
byte entry, readers;      /* shared-write: `owner` above is sharedOwner(D), and this is the owner byte: who enters; readers of it */
byte pres, leave;         /* present, leaving: one bit a slot */
byte mytok[4];            /* handoff(D, token) that the slot shows; 0 none */
byte old[4];              /* one more that it shows, which nobody was told and no note tells of: a libvirtd that died has left it */
short tkh[4];             /* taken(D, token) that the slot holds, a bit a token */
short hd, tk;             /* all handoffs, all takens, derived */
/* Medium::note, as far as it is less than the marks: owner is up and not noted; handoff or leaving is up and no token is noted.
 * Only a libvirtd that died in a call leaves such a bit. */
byte lo, lt, ll;          /* ll: leaving alone is up and not noted, beside a token that is */
#define NOTEDOWN(k) (owner==k+1 && !HAS(lo,k))
#define NOTEDTOK(k) (HAS(lt,k) -> 0 : mytok[k])
#define NOTEDLEAVE(k) (HAS(leave,k) && !HAS(lt,k) && !HAS(ll,k))

byte alive, reg, runs, drain, w;  /* w: can write to the image now */
byte dup;                 /* a libvirtd call holds duplicates of the descriptor: marks outlive QEMU until it ends */
byte in;                  /* a call is under way: s* and e* are kept up to date */
byte eP[5], sP[5];
short eH[4], sH[4], eT[4], sT[4];
byte emode;                /* the stranger's mode: 0 exclusive, 1 shared-write, 2 read-only */
byte dying;               /* file set: descriptors of a dead QEMU are closed one by one */
byte ver[4];              /* RAM: a higher number has run later */

#ifdef SW                /* who enters may be about to remove the lease file: then owner is not free to join on */
#define CURP (pres|((owner==0&&entry==0)<<7))
#else
#define CURP (pres|((owner==0)<<7))
#endif
#define TB(k) ((BIT(mytok[k])|BIT(old[k]))&~1)
#define UPD1(k) if :: HAS(in,k) -> eP[k]=eP[k]|CURP; sP[k]=sP[k]&CURP; eH[k]=eH[k]|hd; sH[k]=sH[k]&hd; eT[k]=eT[k]|tk; sT[k]=sT[k]&tk :: else fi
#ifdef NR
#define UPDR skip
#else
#define UPDR UPD1(3)
#endif
#if defined(SW)
#define CLOSED (entry!=0 || readers!=0)
#else
#define CLOSED (owner!=0)
#endif
#define UPD hd=TB(0)|TB(1)|TB(2)|TB(3); tk=tkh[0]|tkh[1]|tkh[2]|tkh[3]; UPD1(0); UPD1(1); UPD1(2); UPDR; \
  if :: HAS(in,4) -> eP[4]=eP[4]|CURP; sP[4]=sP[4]&CURP :: else fi; \
  assert(!((reg&alive&DMASK)!=0 && (pres&DMASK)==0 && !CLOSED));   /* S2, at every instant: a stranger whose Register ran now would be refused */ \
  assert((alive|dup|in|dying)!=0 || (pres==0 && owner==0 && entry==0 && readers==0 && hd==0 && tk==0))  /* L1: all dead: nothing is left that refuses a start */
/* my own step: the next look begins here */
#define NOW(k) eP[k]=CURP; sP[k]=CURP; eH[k]=hd; sH[k]=hd; eT[k]=tk; sT[k]=tk
#define GONE(k) OFF(in,k); eP[k]=0; sP[k]=0; eH[k]=0; sH[k]=0; eT[k]=0; sT[k]=0
#define CLR(k) OFF(pres,k); OFF(leave,k); mytok[k]=0; old[k]=0; OFF(lo,k); OFF(lt,k); OFF(ll,k); tkh[k]=0; OFF(readers,k); if :: owner==k+1 -> owner=0 :: else fi; if :: entry==k+1 -> entry=0 :: else fi
#ifdef M_STICKY
#define VANISH(k) skip
#elif defined(FILESET)
#define VANISH(k) ON(dying,k)
#else
#define VANISH(k) CLR(k)
#endif
#define DIE(k) SAY(k,"QEMU dies"); OFF(alive,k); OFF(reg,k); OFF(w,k); OFF(runs,k); OFF(drain,k); ver[k]=0; if :: HAS(dup,k) -> skip :: else -> VANISH(k) fi; UPD

#define PICK(v,must,may) if :: (may) -> v=1 :: !(must) -> v=0 fi
#define OTHERS(k) (DMASK&~BIT(k))
#define LOOKOTHERS(v,k) PICK(v,(sP[k]&OTHERS(k))!=0,(eP[k]&OTHERS(k))!=0)
#ifdef SW
#define BADMODE (emode!=1)
#else
#define BADMODE true
#endif
#define LOOKSTRANGERS(v,k) PICK(v,HAS(sP[k],E)&&BADMODE,HAS(eP[k],E)&&BADMODE)
#define LOOKFREE(v,k) PICK(v,(sP[k]&FREEBIT)!=0,(eP[k]&FREEBIT)!=0)
#define MINE(k) TB(k)
#define LOOKHAND(v,k) PICK(v,(sH[k]&~MINE(k))!=0,(eH[k]&~MINE(k))!=0)
#define CNT5(m) (((m)&1)+(((m)>>1)&1)+(((m)>>2)&1)+(((m)>>3)&1)+(((m)>>4)&1)+(((m)>>5)&1)+(((m)>>6)&1)+(((m)>>7)&1)+(((m)>>8)&1)+(((m)>>9)&1))
/* more presents than handoffs among the others: somebody joined and shows no handoff */
#ifdef ANYPEER
#define LOOKJOINER(v,k) LOOKOTHERS(v,k)
#else
#define LOOKJOINER(v,k) PICK(v,CNT5(sP[k]&OTHERS(k))>CNT5(eH[k]&~MINE(k)),CNT5(eP[k]&OTHERS(k))>CNT5(sH[k]&~MINE(k)))
#endif

/* read only when a counterexample is replayed */
#define SAY(i,what) printf("\n%d ", i); printf(what)

#define NW (HAS(w,0)+HAS(w,1)+HAS(w,2)+HAS(w,3)+HAS(w,4))
#define WR(k) ON(w,k); assert(NW<=1)      /* S1 */
