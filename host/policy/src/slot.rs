//! A slot: the place where one policy works, the pointer to its current generation, and the generations on their way out.
//!
//! Publishing is one pointer swap; whoever was inside the old generation finishes there. The swapped-out generation waits
//! in `retired` until nobody is inside and is freed by maintenance, never by a serving thread.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, Guard};
use pointsman_telemetry::{Event, EventKind, Micros};

use crate::circuit::Health;
use crate::drain::Drain;
use crate::engine::stopwatch_ns;
use crate::fault::{FaultKind, FaultReport};
use crate::generation::{Generation, Guest, MAX_INSTANCES};
use crate::host::LogGate;
use crate::instance::{AnyReady, Hook};
use crate::runtime::Shared;
use crate::upload::World;

/// A generation that is ready to be published: warm, probed, and not yet visible to anyone.
pub struct Prepared {
    /// The slot that it was prepared for.
    pub slot: Arc<str>,
    /// `name@version+digest`.
    pub revision: Arc<str>,
    /// Its generation.
    pub generation: u64,
    /// Time from start to warm, in milliseconds.
    pub warm_ms: f64,
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
    /// Not newer than what is active: generations only grow.
    #[error("generation {generation} is not newer than the active generation {active}")]
    Stale {
        /// The one to be published.
        generation: u64,
        /// The active one.
        active: u64,
    },
}

/// How a slot is.
#[derive(Clone, Debug)]
pub struct SlotStatus {
    /// Active revision, `native` for none.
    pub revision: Arc<str>,
    /// Its generation.
    pub generation: u64,
    /// Whether its guest is asked.
    pub health: Health,
    /// Calls of this generation.
    pub calls: u64,
    /// Calls over the soft budget.
    pub overruns: u64,
    /// Faults by kind, in the order of [`FaultKind::ALL`].
    pub faults: [u64; 5],
    /// Decisions that the native policy took in its place.
    pub fallbacks: u64,
    /// The latest fault.
    pub last_fault: Option<FaultReport>,
    /// Instances that exist, in use or not.
    pub instances: u32,
    /// Old generations that someone is still inside, or that maintenance has not freed yet.
    pub draining: u32,
    /// Publishes since the start.
    pub swaps: u64,
}

/// What all slots can do; the app holds them by name.
pub trait Slot: Send + Sync + fmt::Debug {
    /// As in `router` or `telemetry.slo-log`.
    fn name(&self) -> &Arc<str>;

    /// Makes `prepared` the active generation, by one pointer swap.
    ///
    /// # Errors
    /// It was prepared for another slot, or is not newer than the active one.
    fn publish(&self, prepared: Prepared) -> Result<Published, PublishError>;

    /// Makes the native policy the active one, under a new generation.
    ///
    /// # Errors
    /// The generation is not newer than the active one.
    fn publish_native(&self, generation: u64) -> Result<Published, PublishError>;

    /// How the slot is.
    fn status(&self) -> SlotStatus;
}

/// What maintenance does with a slot.
pub(crate) trait Tend: Send + Sync {
    fn tend(&self, now: Micros) -> bool;
    fn name(&self) -> &Arc<str>;
    fn world(&self) -> World;
    /// Instances that a generation should have.
    fn wanted(&self) -> u32;
    fn log(&self) -> &Arc<LogGate>;
}

/// The part of a slot that does not care which world it is.
pub(crate) struct SlotCore<H: Hook> {
    pub(crate) name: Arc<str>,
    pub(crate) shared: Arc<Shared>,
    current: ArcSwap<Generation<H>>,
    retired: Mutex<Vec<Arc<Generation<H>>>>,
    wanted: AtomicU32,
    swaps: AtomicU64,
    alive: Arc<()>,
    log: Arc<LogGate>,
    /// One publish, one round of maintenance at a time; serving threads never take these.
    publishing: Mutex<()>,
    tending: Mutex<()>,
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

// === impl SlotCore ===

impl<H: Hook> SlotCore<H> {
    pub(crate) fn new(name: Arc<str>, shared: Arc<Shared>, wanted: u32) -> Self {
        let alive = Arc::new(());
        Self {
            log: Arc::new(LogGate::new(Arc::clone(&name))),
            current: ArcSwap::from_pointee(Generation::native(0, Arc::clone(&alive))),
            name,
            shared,
            retired: Mutex::default(),
            wanted: AtomicU32::new(wanted),
            swaps: AtomicU64::new(0),
            alive,
            publishing: Mutex::new(()),
            tending: Mutex::new(()),
        }
    }

    /// Enters the current generation for the length of a call.
    #[inline]
    pub(crate) fn enter(&self) -> Inside<'_, H> {
        loop {
            let generation = self.current.load();
            match generation.gate.enter() {
                Ok(()) => return Inside { generation, shared: &self.shared },
                // Retired since it was loaded: the next one is already published.
                Err(Drain::Drained) => self.shared.wake(),
                Err(Drain::Pending) => {}
            }
        }
    }

    /// Enters the current generation to stay; leave it with [`leave`](Self::leave).
    pub(crate) fn enter_to_stay(&self) -> Arc<Generation<H>> {
        loop {
            let generation = self.current.load_full();
            match generation.gate.enter() {
                Ok(()) => return generation,
                Err(Drain::Drained) => self.shared.wake(),
                Err(Drain::Pending) => {}
            }
        }
    }

    pub(crate) fn leave(&self, generation: &Generation<H>) {
        if generation.gate.leave() == Drain::Drained {
            self.shared.wake();
        }
    }

    /// Whether `generation` is still the current one.
    #[inline]
    pub(crate) fn is_current(&self, generation: &Arc<Generation<H>>) -> bool {
        std::ptr::eq(&**self.current.load(), &**generation)
    }

    /// One more or one fewer instance is needed: a replica came or went.
    pub(crate) fn want(&self, change: i32) {
        let _ =
            self.wanted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| Some(n.saturating_add_signed(change)));
        self.shared.wake();
    }

    pub(crate) fn publish_ready(&self, prepared: Prepared) -> Result<Published, PublishError> {
        let other = || PublishError::OtherSlot { prepared: Arc::clone(&prepared.slot), slot: Arc::clone(&self.name) };
        if prepared.slot != self.name {
            return Err(other());
        }
        let error = other();
        let ready = H::unwrap(prepared.ready).ok_or(error)?;
        let generation = Generation::new(ready, &self.shared.metrics, Arc::clone(&self.alive));
        self.swap(generation, prepared.warm_ms)
    }

    pub(crate) fn swap_native(&self, generation: u64) -> Result<Published, PublishError> {
        self.swap(Generation::native(generation, Arc::clone(&self.alive)), 0.0)
    }

    fn swap(&self, next: Generation<H>, warm_ms: f64) -> Result<Published, PublishError> {
        let _one = self.publishing.lock().unwrap_or_else(PoisonError::into_inner);
        let active = self.current.load().number();
        let generation = next.number();
        if generation <= active {
            return Err(PublishError::Stale { generation, active });
        }
        let revision = Arc::clone(&next.decided_by.revision);
        let next = Arc::new(next);
        let started = stopwatch_ns();
        let old = self.current.swap(next);
        let publish_ns = stopwatch_ns() - started;
        self.swaps.fetch_add(1, Ordering::Relaxed);
        // Kept before it is closed: nobody may find it drained and free it while a reader still holds a pointer to it.
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&old));
        old.gate.retire();
        drop(old);
        self.shared.metrics.published(&self.name, generation, publish_ns as f64 * 1e-9);
        let now = (self.shared.clock)();
        let event = Event { generation, a: generation, b: publish_ns, ..Event::new(now, EventKind::Swap) };
        self.shared.recorder.record(event);
        self.shared.wake();
        Ok(Published { revision, generation, warm_ms, publish_us: publish_ns as f64 * 1e-3 })
    }

    pub(crate) fn slot_status(&self) -> SlotStatus {
        let current = self.current.load();
        let guest = current.guest.as_ref().map(Guest::status);
        SlotStatus {
            revision: Arc::clone(&current.decided_by.revision),
            generation: current.number(),
            health: guest.as_ref().map_or(Health::Closed, |g| g.health),
            calls: guest.as_ref().map_or(0, |g| g.calls),
            overruns: guest.as_ref().map_or(0, |g| g.overruns),
            faults: guest.as_ref().map_or([0; FaultKind::ALL.len()], |g| g.faults),
            fallbacks: guest.as_ref().map_or(0, |g| g.fallbacks),
            instances: guest.as_ref().map_or(0, |g| g.instances),
            last_fault: guest.and_then(|g| g.last_fault),
            draining: u32::try_from(Arc::strong_count(&self.alive).saturating_sub(2)).unwrap_or(u32::MAX),
            swaps: self.swaps.load(Ordering::Relaxed),
        }
    }
}

impl<H: Hook> Tend for SlotCore<H> {
    fn tend(&self, now: Micros) -> bool {
        let Ok(_one) = self.tending.try_lock() else { return false };
        let mut drained = Vec::new();
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).retain(|generation| {
            // One reference is ours: no reader that was late at the gate still holds another.
            let free = generation.gate.is_drained() && Arc::strong_count(generation) == 1;
            if free {
                drained.push(Arc::clone(generation));
            }
            !free
        });
        let freed = !drained.is_empty();
        drop(drained);
        let wanted = self.wanted();
        let current = self.enter();
        current.guest.as_ref().is_some_and(|guest| guest.tend(now, wanted)) || freed
    }

    fn name(&self) -> &Arc<str> {
        &self.name
    }

    fn world(&self) -> World {
        H::WORLD
    }

    fn wanted(&self) -> u32 {
        self.wanted.load(Ordering::Relaxed).min(MAX_INSTANCES as u32)
    }

    fn log(&self) -> &Arc<LogGate> {
        &self.log
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
                self.core.swap_native(generation)
            }

            fn status(&self) -> crate::slot::SlotStatus {
                self.core.slot_status()
            }
        }
    };
}
pub(crate) use slot_by_core;
