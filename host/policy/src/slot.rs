//! A slot: the place where one policy works, the pointer to the generation that serves, the candidate that may be staged
//! beside it, and the generations on their way out.
//!
//! Publishing is one pointer swap; whoever was inside the old generation finishes there. The swapped-out generation waits
//! in `retired` until nobody is inside and is freed by maintenance, never by a serving thread. A staged candidate is kept as
//! warm as what it may replace, so that [`Slot::serve`] is a pointer swap too and retires nobody: switching between the two
//! every minute costs neither a start nor a drain. Two pointers and a coin per call would split traffic finer, but shared
//! capacity makes such a split no experiment: arms that share a batch disturb each other.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use pointsman_telemetry::{Event, EventKind, Micros};

use crate::circuit::Health;
use crate::drain::Drain;
use crate::engine::stopwatch_ns;
use crate::fault::{FaultKind, FaultReport};
use crate::generation::{Generation, Guest, MAX_INSTANCES};
use crate::handover::{Handed, Inheritance, NotHandedOver};
use crate::host::LogGate;
use crate::instance::{AnyReady, Hook};
use crate::runtime::Shared;
use crate::shadow::{Case, Compared, Shadow};
use crate::upload::World;

/// A generation that is ready to be published: warm, probed, and not yet visible to anyone.
pub struct Prepared {
    /// The slot that it was prepared for.
    pub slot: Arc<str>,
    /// `name@version+digest`.
    pub revision: Arc<str>,
    /// What it says that it does, in one line; may be empty.
    pub summary: Arc<str>,
    /// Its generation.
    pub generation: u64,
    /// Time from start to warm, in milliseconds.
    pub warm_ms: f64,
    /// What the active policy has handed over; absent where the component does not take it.
    pub inherited: Option<Inheritance>,
    pub(crate) ready: AnyReady,
}

/// What a publish did.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    /// The revision that answers from now on.
    pub revision: Arc<str>,
    /// Its generation.
    pub generation: u64,
    /// Time from start to warm, in milliseconds; 0 for native.
    pub warm_ms: f64,
    /// Time of the swap itself, in microseconds.
    pub publish_us: f64,
}

/// Why a generation was not published; the old one keeps serving.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Prepared for another slot.
    #[error("the generation was prepared for the slot {prepared} and not for {slot}")]
    OtherSlot {
        /// That slot.
        prepared: Arc<str>,
        /// This slot.
        slot: Arc<str>,
    },
    /// Not newer than what the slot has seen: generations only grow.
    #[error("generation {generation} is not newer than generation {newest}, which the slot has seen already")]
    Stale {
        /// The one to be published.
        generation: u64,
        /// The newest one that was published or staged here.
        newest: u64,
    },
    /// A candidate is staged, and would be lost without a word.
    #[error("generation {candidate} is staged as a candidate; promote it or take it back first")]
    Staged {
        /// The candidate.
        candidate: u64,
    },
    /// There is nothing to compare: a hook that decides nothing.
    #[error("the slot {slot} takes no shadow: activate the component beside it, as `telemetry.<another name>`")]
    NoShadow {
        /// This slot.
        slot: Arc<str>,
    },
    /// No thread for a shadow: the machine's limit.
    #[error("no thread for the shadow: {detail}")]
    NoThread {
        /// In the machine's words.
        detail: String,
    },
    /// There is no candidate to serve, promote or take back.
    #[error("no candidate is staged in the slot {slot}; stage one first")]
    NothingStaged {
        /// This slot.
        slot: Arc<str>,
    },
}

/// One of the two policies of a slot in which a candidate is staged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Arm {
    /// The active policy: what stays unless the candidate is promoted.
    #[default]
    Control,
    /// The staged one.
    Candidate,
}

/// How a policy of a slot is.
#[derive(Clone, Debug)]
pub struct SlotStatus {
    /// Its revision, `native` for none.
    pub revision: Arc<str>,
    /// Its generation.
    pub generation: u64,
    /// Whether it decides now.
    pub serving: bool,
    /// Whether its guest is asked.
    pub health: Health,
    /// Calls of this generation.
    pub calls: u64,
    /// Their time together, in nanoseconds.
    pub call_ns: u64,
    /// Calls over the soft budget.
    pub overruns: u64,
    /// Replicas whose scheduler guest computes aside, because it is over the soft budget.
    pub aside: u32,
    /// Plans that were computed aside and used.
    pub late_plans: u64,
    /// Plans that were computed aside and came to nothing.
    pub dropped_plans: u64,
    /// Faults by kind, in the order of [`FaultKind::ALL`].
    pub faults: [u64; 5],
    /// Decisions that the native policy took in its place.
    pub fallbacks: u64,
    /// The latest fault.
    pub last_fault: Option<FaultReport>,
    /// Instances that exist, in use or not.
    pub instances: u32,
    /// Bytes of its host-state: of its namespace, or of what it has of its own while it is tried.
    pub state_bytes: u64,
    /// Old generations that someone is still inside, or that maintenance has not freed yet.
    pub draining: u32,
    /// Pointer swaps of the slot since the start.
    pub swaps: u64,
}

/// Who decides in a slot, for whoever keeps what was decided: two that are equal have decided alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deciding {
    /// The generation; none for the native policy.
    pub generation: Option<u64>,
    /// Another number after each pointer swap, fault, and decision taken in the guest's place.
    pub mark: u64,
    /// Whether a candidate is staged.
    pub is_trial: bool,
}

/// What all slots can do; the app holds them by name.
pub trait Slot: Send + Sync + fmt::Debug {
    /// As in `router` or `telemetry.slo-log`.
    fn name(&self) -> &Arc<str>;

    /// Makes `prepared` the active generation, by one pointer swap.
    ///
    /// # Errors
    /// It was prepared for another slot, is not newer than what the slot has seen, or a candidate is staged.
    fn publish(&self, prepared: Prepared) -> Result<Published, PublishError>;

    /// Makes the native policy the active one, under a new generation.
    ///
    /// # Errors
    /// The generation is not newer than what the slot has seen, or a candidate is staged.
    fn publish_native(&self, generation: u64) -> Result<Published, PublishError>;

    /// Keeps `prepared` warm beside the active policy. It answers nothing until [`serve`](Self::serve) says so. From now on
    /// its host-state is its own: from its preparation, if that was for [`Role::Candidate`](crate::Role) or for a shadow.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    fn stage(&self, prepared: Prepared) -> Result<(), PublishError>;

    /// Stages the native policy.
    ///
    /// # Errors
    /// As [`publish_native`](Self::publish_native).
    fn stage_native(&self, generation: u64) -> Result<(), PublishError>;

    /// Lets one arm decide from now on, by one pointer swap; the other stays warm. Nothing happens if it does already.
    ///
    /// # Errors
    /// No candidate is staged.
    fn serve(&self, arm: Arm) -> Result<Published, PublishError>;

    /// Puts this share of the active policy's decisions, in millionths, to the staged candidate too, off the path, and compares
    /// its answers; 0 puts nothing to it until the next call.
    ///
    /// # Errors
    /// No candidate is staged, the slot takes no shadow, or there is no thread for it.
    fn shadow(&self, share_ppm: u32) -> Result<(), PublishError>;

    /// What the staged candidate's answers have come to as a shadow.
    fn compared(&self) -> Option<Compared>;

    /// Makes the candidate the active policy for good, and its host-state that of the slot; what was active drains.
    ///
    /// # Errors
    /// No candidate is staged.
    fn promote(&self) -> Result<Published, PublishError>;

    /// Returns to the active policy for good; the candidate drains, and its host-state is thrown away.
    ///
    /// # Errors
    /// No candidate is staged.
    fn unstage(&self) -> Result<Published, PublishError>;

    /// How the active policy is: the control, where a candidate is staged.
    fn status(&self) -> SlotStatus;

    /// How the staged candidate is.
    fn candidate(&self) -> Option<SlotStatus>;
}

/// What maintenance does with a slot.
pub(crate) trait Tend: Send + Sync {
    /// Frees what nobody uses any more. Quick: an activation that needs the room waits for it.
    fn free(&self);
    /// Starts missing instances, which may take as long as `init` may.
    fn respawn(&self, now: Micros);
    fn name(&self) -> &Arc<str>;
    fn world(&self) -> World;
    /// Instances that a generation should have.
    fn wanted(&self) -> u32;
    fn log(&self) -> &Arc<LogGate>;
    /// What the instances that serve hand over to the next generation; may wait so long for their owners.
    fn hand_over(&self, now: Micros, patience_ns: u64) -> Result<Vec<Handed>, NotHandedOver>;
}

/// The part of a slot that does not care which world it is.
pub(crate) struct SlotCore<H: Hook> {
    pub(crate) name: Arc<str>,
    pub(crate) shared: Arc<Shared>,
    current: ArcSwap<Generation<H>>,
    /// The native policy, which decides while the runtime is bypassed; nothing is ever published here.
    native: ArcSwap<Generation<H>>,
    retired: Mutex<Vec<Arc<Generation<H>>>>,
    /// Instances of a generation beside those of the owners.
    spares: u32,
    /// Those who each keep an instance, by name.
    owners: Mutex<Vec<Arc<str>>>,
    swaps: AtomicU64,
    alive: Arc<()>,
    log: Arc<LogGate>,
    /// Of a million decisions, those that are put to the shadow, if there is one.
    share_ppm: Arc<AtomicU32>,
    shadow: ArcSwapOption<Shadow<H>>,
    /// Whether a candidate is staged, for serving threads.
    is_trial: AtomicBool,
    /// Held while the pointer moves; serving threads never take it.
    arms: Mutex<Arms<H>>,
    /// One thread at a time starts instances here.
    respawning: Mutex<()>,
}

/// Who may serve in a slot.
struct Arms<H: Hook> {
    /// The newest generation that was published or staged here.
    newest: u64,
    staged: Option<Staged<H>>,
}

/// The two policies of a slot with a candidate; `serving` is the current one.
struct Staged<H: Hook> {
    control: Arc<Generation<H>>,
    candidate: Arc<Generation<H>>,
    serving: Arm,
}

/// Being inside a generation for longer than a call; shared by those who work for one replica. The last one out leaves.
pub(crate) struct Stay<H: Hook> {
    core: Arc<SlotCore<H>>,
    generation: Arc<Generation<H>>,
}

/// A generation that the caller is inside of.
pub(crate) struct Inside<'a, H: Hook> {
    generation: Guard<Arc<Generation<H>>>,
    shared: &'a Shared,
}

impl<H: Hook> std::ops::Deref for Inside<'_, H> {
    type Target = Generation<H>;

    #[inline]
    fn deref(&self) -> &Generation<H> {
        &self.generation
    }
}

impl<H: Hook> Drop for Inside<'_, H> {
    #[inline]
    fn drop(&mut self) {
        if self.generation.gate.leave() == Drain::Drained {
            self.shared.wake();
        }
    }
}

impl<H: Hook> Stay<H> {
    pub(crate) fn shared(&self) -> &Shared {
        &self.core.shared
    }
}

impl<H: Hook> std::ops::Deref for Stay<H> {
    type Target = Generation<H>;

    #[inline]
    fn deref(&self) -> &Generation<H> {
        &self.generation
    }
}

impl<H: Hook> Drop for Stay<H> {
    fn drop(&mut self) {
        self.generation.guest.iter().for_each(|guest| guest.questions.part());
        if self.generation.gate.leave() == Drain::Drained {
            self.core.shared.wake();
        }
    }
}

// === impl SlotCore ===

impl<H: Hook> SlotCore<H> {
    pub(crate) fn new(name: Arc<str>, shared: Arc<Shared>, spares: u32) -> Self {
        let alive = Arc::new(());
        Self {
            log: Arc::new(LogGate::new(Arc::clone(&name))),
            current: ArcSwap::from_pointee(Generation::native(0, Arc::clone(&alive))),
            native: ArcSwap::from_pointee(Generation::native(0, Arc::default())),
            name,
            shared,
            retired: Mutex::default(),
            spares,
            owners: Mutex::default(),
            swaps: AtomicU64::new(0),
            alive,
            share_ppm: Arc::default(),
            shadow: ArcSwapOption::empty(),
            is_trial: AtomicBool::new(false),
            arms: Mutex::new(Arms { newest: 0, staged: None }),
            respawning: Mutex::new(()),
        }
    }

    /// Whether the native policy stands in for whatever is published here.
    #[inline]
    pub(crate) fn is_bypassed(&self) -> bool {
        self.shared.bypassed.load(Ordering::Relaxed)
    }

    /// Who decides now.
    #[inline]
    fn deciding(&self) -> &ArcSwap<Generation<H>> {
        if self.is_bypassed() { &self.native } else { &self.current }
    }

    /// Enters the current generation for the length of a call.
    #[inline]
    pub(crate) fn enter(&self) -> Inside<'_, H> {
        loop {
            let generation = self.deciding().load();
            match generation.gate.enter() {
                Ok(()) => return Inside { generation, shared: &self.shared },
                // Retired since it was loaded: the next one is already published.
                Err(Drain::Drained) => self.shared.wake(),
                Err(Drain::Pending) => {}
            }
        }
    }

    /// Whether no guest decides now: one pointer load.
    #[inline]
    pub(crate) fn is_native(&self) -> bool {
        self.deciding().load().guest.is_none()
    }

    /// Who decides now. Where nobody may go on without a guest, the native policy does not.
    pub(crate) fn deciding_now(&self) -> Deciding {
        let generation = self.enter();
        let missteps = generation.guest.as_ref().map_or(0, Guest::missteps);
        Deciding {
            generation: (!generation.serves_without()).then(|| generation.number()),
            mark: self.swaps.load(Ordering::Relaxed) + missteps,
            is_trial: self.is_trial.load(Ordering::Relaxed),
        }
    }

    /// Enters the current generation to stay.
    pub(crate) fn stay(self: &Arc<Self>) -> Stay<H> {
        loop {
            let generation = self.deciding().load_full();
            match generation.gate.enter() {
                Ok(()) => {
                    generation.guest.iter().for_each(|guest| guest.questions.join());
                    return Stay { core: Arc::clone(self), generation };
                }
                Err(Drain::Drained) => self.shared.wake(),
                Err(Drain::Pending) => {}
            }
        }
    }

    /// Whether `generation` is still the current one.
    #[inline]
    pub(crate) fn is_current(&self, generation: &Generation<H>) -> bool {
        std::ptr::eq(&**self.deciding().load(), generation)
    }

    /// Somebody has come who will keep an instance: one more is needed.
    pub(crate) fn welcome(&self, owner: &Arc<str>) {
        self.owners().push(Arc::clone(owner));
        self.shared.wake();
    }

    /// An owner is gone for good: one fewer is needed, in whichever arm, and maintenance lets go of what is kept for it.
    pub(crate) fn dismiss(&self, owner: &str) {
        let mut owners = self.owners();
        if let Some(at) = owners.iter().position(|known| **known == *owner) {
            owners.swap_remove(at);
        }
        drop(owners);
        self.shared.wake();
    }

    fn owners(&self) -> MutexGuard<'_, Vec<Arc<str>>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arms(&self) -> MutexGuard<'_, Arms<H>> {
        self.arms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn native(&self, generation: u64) -> Generation<H> {
        Generation::native(generation, Arc::clone(&self.alive))
    }

    fn guest(&self, prepared: Prepared) -> Result<Generation<H>, PublishError> {
        let other = || PublishError::OtherSlot { prepared: Arc::clone(&prepared.slot), slot: Arc::clone(&self.name) };
        if prepared.slot != self.name {
            return Err(other());
        }
        let error = other();
        let ready = H::unwrap(prepared.ready).ok_or(error)?;
        Ok(Generation::new(ready, &self.shared.metrics, Arc::clone(&self.alive)))
    }

    pub(crate) fn publish_ready(&self, prepared: Prepared) -> Result<Published, PublishError> {
        let warm_ms = prepared.warm_ms;
        Ok(Published { warm_ms, ..self.swap(self.guest(prepared)?)? })
    }

    pub(crate) fn publish_native(&self, generation: u64) -> Result<Published, PublishError> {
        self.swap(self.native(generation))
    }

    /// Puts nobody in the place of whoever decides here, the native policy included, under its number.
    pub(crate) fn refuse(&self) {
        let _arms = self.arms();
        let refusing = Generation::refusing(self.current.load().number(), Arc::clone(&self.alive));
        let (old, _) = self.point_to(&Arc::new(refusing));
        self.retire(old);
    }

    fn swap(&self, next: Generation<H>) -> Result<Published, PublishError> {
        let mut arms = self.arms();
        arms.admit(next.number())?;
        next.guest.iter().for_each(|guest| guest.state().adopt());
        let (old, published) = self.point_to(&Arc::new(next));
        self.retire(old);
        Ok(published)
    }

    pub(crate) fn stage_ready(&self, prepared: Prepared) -> Result<(), PublishError> {
        self.stage(self.guest(prepared)?)
    }

    pub(crate) fn stage_native(&self, generation: u64) -> Result<(), PublishError> {
        self.stage(self.native(generation))
    }

    fn stage(&self, candidate: Generation<H>) -> Result<(), PublishError> {
        let mut arms = self.arms();
        arms.admit(candidate.number())?;
        candidate.guest.iter().for_each(|guest| self.shared.fork(guest.state()));
        let control = self.current.load_full();
        arms.staged = Some(Staged { control, candidate: Arc::new(candidate), serving: Arm::Control });
        self.is_trial.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn serve(&self, arm: Arm) -> Result<Published, PublishError> {
        let mut arms = self.arms();
        let staged = arms.staged.as_mut().ok_or_else(|| self.nothing_staged())?;
        let next = match arm {
            Arm::Control => &staged.control,
            Arm::Candidate => &staged.candidate,
        };
        if std::mem::replace(&mut staged.serving, arm) == arm {
            return Ok(Published::unchanged(next));
        }
        Ok(self.point_to(next).1)
    }

    /// Lets the candidate be asked beside the active policy from now on, about a share of what that decides.
    pub(crate) fn shadow(&self, share_ppm: u32) -> Result<(), PublishError> {
        let arms = self.arms();
        let staged = arms.staged.as_ref().ok_or_else(|| self.nothing_staged())?;
        if H::DIFFERENCES.is_empty() {
            return Err(PublishError::NoShadow { slot: Arc::clone(&self.name) });
        }
        if self.shadow.load().is_none() {
            let shadow = Shadow::hire(&self.shared, &staged.candidate, &self.share_ppm)
                .map_err(|error| PublishError::NoThread { detail: error.to_string() })?;
            self.shadow.store(Some(Arc::new(shadow)));
        }
        self.share_ppm.store(share_ppm, Ordering::Relaxed);
        Ok(())
    }

    /// Whether a shadow is to be asked; where there is none, the cost is the load of a number.
    #[inline]
    pub(crate) fn is_shadowed(&self) -> bool {
        self.share_ppm.load(Ordering::Relaxed) != 0 && !self.is_bypassed()
    }

    /// The shadow, while it is to be asked.
    #[inline]
    pub(crate) fn shadowed(&self) -> Option<Arc<Shadow<H>>> {
        if self.is_shadowed() { self.shadow.load_full() } else { None }
    }

    /// The shadow, asked or not.
    pub(crate) fn any_shadow(&self) -> Option<Arc<Shadow<H>>> {
        self.shadow.load_full()
    }

    /// What it has in common with its thread.
    pub(crate) fn case(&self) -> Option<Arc<Case<H>>> {
        self.shadow.load().as_ref().map(|shadow| Arc::clone(&shadow.case))
    }

    /// Ends the staging: one arm stays, the other drains.
    pub(crate) fn settle(&self, stays: Arm) -> Result<Published, PublishError> {
        let mut arms = self.arms();
        let staged = arms.staged.take().ok_or_else(|| self.nothing_staged())?;
        self.is_trial.store(false, Ordering::Relaxed);
        self.share_ppm.store(0, Ordering::Relaxed);
        self.shadow.swap(None).iter().for_each(|shadow| shadow.case.end());
        let (winner, loser) = match stays {
            Arm::Control => (staged.control, staged.candidate),
            Arm::Candidate => (staged.candidate, staged.control),
        };
        let published = if staged.serving == stays { Published::unchanged(&winner) } else { self.point_to(&winner).1 };
        winner.guest.iter().for_each(|guest| guest.state().adopt());
        self.retire(loser);
        Ok(published)
    }

    fn nothing_staged(&self) -> PublishError {
        PublishError::NothingStaged { slot: Arc::clone(&self.name) }
    }

    /// The pointer swap. The caller holds `arms`, and keeps or retires what was current.
    fn point_to(&self, next: &Arc<Generation<H>>) -> (Arc<Generation<H>>, Published) {
        let started = stopwatch_ns();
        let old = self.current.swap(Arc::clone(next));
        let publish_ns = stopwatch_ns() - started;
        self.swaps.fetch_add(1, Ordering::Relaxed);
        let generation = next.number();
        self.shared.metrics.published(&self.name, generation, publish_ns as f64 * 1e-9);
        let now = (self.shared.clock)();
        let event = Event { generation, a: generation, b: publish_ns, ..Event::new(now, EventKind::Swap) };
        self.shared.recorder.record(event);
        (old, Published { publish_us: publish_ns as f64 * 1e-3, ..Published::unchanged(next) })
    }

    /// Lets a generation drain that nobody will point to again.
    fn retire(&self, old: Arc<Generation<H>>) {
        // Kept before it is closed: nobody may find it drained and free it while a reader still holds a pointer to it.
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&old));
        old.gate.retire();
        drop(old);
        self.shared.wake();
    }

    /// Those that may serve: the current generation, and both arms where a candidate is staged.
    pub(crate) fn warm(&self) -> Vec<Arc<Generation<H>>> {
        let arms = self.arms();
        match &arms.staged {
            Some(staged) => vec![Arc::clone(&staged.control), Arc::clone(&staged.candidate)],
            None => vec![self.current.load_full()],
        }
    }

    pub(crate) fn slot_status(&self) -> SlotStatus {
        let arms = self.arms();
        match &arms.staged {
            Some(staged) => self.status_of(&staged.control, 2, staged.serving == Arm::Control),
            None => self.status_of(&self.current.load(), 1, true),
        }
    }

    pub(crate) fn candidate_status(&self) -> Option<SlotStatus> {
        let arms = self.arms();
        let staged = arms.staged.as_ref()?;
        Some(self.status_of(&staged.candidate, 2, staged.serving == Arm::Candidate))
    }

    fn status_of(&self, generation: &Generation<H>, n_warm: usize, serving: bool) -> SlotStatus {
        let guest = generation.guest.as_ref().map(Guest::status);
        SlotStatus {
            revision: Arc::clone(&generation.decided_by.revision),
            generation: generation.number(),
            serving,
            health: guest.as_ref().map_or(Health::Closed, |g| g.health),
            calls: guest.as_ref().map_or(0, |g| g.calls),
            call_ns: guest.as_ref().map_or(0, |g| g.call_ns),
            overruns: guest.as_ref().map_or(0, |g| g.overruns),
            aside: guest.as_ref().map_or(0, |g| g.aside),
            late_plans: guest.as_ref().map_or(0, |g| g.late_plans),
            dropped_plans: guest.as_ref().map_or(0, |g| g.dropped_plans),
            faults: guest.as_ref().map_or([0; FaultKind::ALL.len()], |g| g.faults),
            fallbacks: guest.as_ref().map_or(0, |g| g.fallbacks),
            instances: guest.as_ref().map_or(0, |g| g.instances),
            state_bytes: guest.as_ref().map_or(0, |g| g.state_bytes),
            last_fault: guest.and_then(|g| g.last_fault),
            draining: u32::try_from(Arc::strong_count(&self.alive).saturating_sub(1 + n_warm)).unwrap_or(u32::MAX),
            swaps: self.swaps.load(Ordering::Relaxed),
        }
    }
}

// === impl Arms ===

impl<H: Hook> Arms<H> {
    /// Takes note of a new generation, if one may come now.
    fn admit(&mut self, generation: u64) -> Result<(), PublishError> {
        if let Some(staged) = &self.staged {
            return Err(PublishError::Staged { candidate: staged.candidate.number() });
        }
        if generation <= self.newest {
            return Err(PublishError::Stale { generation, newest: self.newest });
        }
        self.newest = generation;
        Ok(())
    }
}

// === impl Published ===

impl Published {
    /// `generation` serves already.
    fn unchanged<H: Hook>(generation: &Generation<H>) -> Self {
        let revision = Arc::clone(&generation.decided_by.revision);
        Self { revision, generation: generation.number(), warm_ms: 0.0, publish_us: 0.0 }
    }
}

// === impl Tend ===

impl<H: Hook> Tend for SlotCore<H> {
    fn free(&self) {
        let mut drained = Vec::new();
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).retain(|generation| {
            // One reference is ours: no reader that was late at the gate still holds another.
            let free = generation.gate.is_drained() && Arc::strong_count(generation) == 1;
            if free {
                drained.push(Arc::clone(generation));
            }
            !free
        });
        drop(drained);
        for generation in self.warm() {
            generation.guest.iter().for_each(Guest::free);
        }
    }

    fn respawn(&self, now: Micros) {
        let Ok(_one) = self.respawning.try_lock() else { return };
        let owners = self.owners().clone();
        let wanted = self.wanted();
        for guest in self.warm().iter().filter_map(|generation| generation.guest.as_ref()) {
            guest.forget_all_but(&owners);
            guest.fill(now, wanted);
        }
    }

    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn world(&self) -> World {
        H::WORLD
    }

    fn wanted(&self) -> u32 {
        let owners = u32::try_from(self.owners().len()).unwrap_or(u32::MAX);
        self.spares.saturating_add(owners).min(MAX_INSTANCES as u32)
    }

    fn log(&self) -> &Arc<LogGate> {
        &self.log
    }

    fn hand_over(&self, now: Micros, patience_ns: u64) -> Result<Vec<Handed>, NotHandedOver> {
        let generation = self.current.load_full();
        let guest = generation.guest.as_ref().ok_or(NotHandedOver::Native)?;
        if !guest.hands_over() {
            return Err(NotHandedOver::NotExported);
        }
        Ok(guest.hand_over(now, patience_ns, self.shared.bypassed.load(Ordering::Relaxed)))
    }
}

impl<H: Hook> fmt::Debug for SlotCore<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("name", &self.name).field("current", &*self.current.load()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared")
            .field("slot", &self.slot)
            .field("revision", &self.revision)
            .field("generation", &self.generation)
            .field("warm_ms", &self.warm_ms)
            .finish_non_exhaustive()
    }
}

/// Implements [`Slot`] for a slot that wraps `core: Arc<SlotCore<_>>`.
macro_rules! slot_by_core {
    ($slot:ty) => {
        impl crate::slot::Slot for $slot {
            fn name(&self) -> &std::sync::Arc<str> {
                &self.core.name
            }

            fn publish(
                &self,
                prepared: crate::slot::Prepared,
            ) -> Result<crate::slot::Published, crate::slot::PublishError> {
                self.core.publish_ready(prepared)
            }

            fn publish_native(&self, generation: u64) -> Result<crate::slot::Published, crate::slot::PublishError> {
                self.core.publish_native(generation)
            }

            fn stage(&self, prepared: crate::slot::Prepared) -> Result<(), crate::slot::PublishError> {
                self.core.stage_ready(prepared)
            }

            fn stage_native(&self, generation: u64) -> Result<(), crate::slot::PublishError> {
                self.core.stage_native(generation)
            }

            fn serve(&self, arm: crate::slot::Arm) -> Result<crate::slot::Published, crate::slot::PublishError> {
                self.core.serve(arm)
            }

            fn shadow(&self, share_ppm: u32) -> Result<(), crate::slot::PublishError> {
                self.core.shadow(share_ppm)
            }

            fn compared(&self) -> Option<crate::shadow::Compared> {
                self.core.case().map(|case| case.compared())
            }

            fn promote(&self) -> Result<crate::slot::Published, crate::slot::PublishError> {
                self.core.settle(crate::slot::Arm::Candidate)
            }

            fn unstage(&self) -> Result<crate::slot::Published, crate::slot::PublishError> {
                self.core.settle(crate::slot::Arm::Control)
            }

            fn status(&self) -> crate::slot::SlotStatus {
                self.core.slot_status()
            }

            fn candidate(&self) -> Option<crate::slot::SlotStatus> {
                self.core.candidate_status()
            }
        }
    };
}
pub(crate) use slot_by_core;
