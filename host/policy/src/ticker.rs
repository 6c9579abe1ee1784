//! The thread that advances the engine's epoch: every millisecond while guests are called, ten times a second while none is.
//!
//! A plain thread: a timer task would share its runtime with the guests that it must interrupt. It slows down because a thousand
//! wake-ups a second cost 1.3 % of a core on a host that does nothing. It never stops, so that no guest can run without an end,
//! whatever is wrong with the argument below.
//!
//! **Why a call that begins finds it awake.** A call first sets its deadline to the next tick, then looks at the pace. The ticker says
//! that it is about to slow down, ticks for a second more, and slows down only if no call has contradicted by then. So
//!
//! - a call that sees `Slowing` puts `Quick` back: the ticker has yet to look and finds that it must go on, at the next quick tick;
//! - a call that sees `Slow` says `Waking` and wakes the ticker, and so does every call until the ticker itself has said `Quick`: one
//!   that had said that it wakes it might have been put aside before it did. The ticker ticks after that, and after the deadline was set;
//! - a call that sees `Quick` read the epoch before the last tick that came after `Slowing` was said: else, by the fences, it would have
//!   seen that word as well. That tick is the one that its deadline waits for.
//!
//! A guest that outlives its first tick tells the ticker so at each tick that finds it running. Only one whose thread is
//! put aside for seconds, just between telling and its next deadline, could find the ticker slow: it is then interrupted at a slow tick.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering, fence};
use std::thread::Thread;
use std::time::Duration;

use wasmtime::Engine;

/// One tick of the epoch: the resolution of hard budgets.
const TICK: Duration = Duration::from_millis(1);
/// The same while no guest is called.
const SLOW_TICK: Duration = Duration::from_millis(100);
/// Ticks without a call after which the ticker says that it slows down, and after which it does.
const LULL: u32 = 1_000;

/// How fast it ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Pace {
    Quick,
    /// It becomes slow unless somebody calls.
    Slowing,
    Slow,
    /// It was slow and somebody has called; the ticker alone ends that.
    Waking,
}

/// What calls and the thread tell one another.
#[derive(Debug, Default)]
struct Beat {
    /// A [`Pace`]. Calls write it once a lull, so that reading it costs them no cache line of another core's.
    pace: AtomicU8,
}

/// Whoever calls guests has one.
#[derive(Clone, Debug)]
pub(crate) struct Ticker {
    beat: Arc<Beat>,
    thread: Thread,
}

// === impl Beat ===

impl Beat {
    /// A guest is called, or runs: true where the thread must be woken.
    #[inline]
    fn heard(&self) -> bool {
        // After the epoch was read for the deadline; one half of the pair, `lull` has the other.
        fence(Ordering::Acquire);
        self.pace.load(Ordering::Relaxed) != Pace::Quick as u8 && self.rouse()
    }

    #[cold]
    fn rouse(&self) -> bool {
        const ASLEEP: [u8; 2] = [Pace::Slow as u8, Pace::Waking as u8];
        let next = |pace| Some(if ASLEEP.contains(&pace) { Pace::Waking } else { Pace::Quick } as u8);
        let was = self.pace.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        was.is_ok_and(|was| ASLEEP.contains(&was))
    }

    /// As many ticks as a lull has are over: how fast it goes on.
    fn lull(&self) -> Pace {
        let next = |from: Pace, to: Pace| {
            let changed = self.pace.compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Acquire).is_ok();
            changed.then_some(to)
        };
        let woken = next(Pace::Waking, Pace::Quick);
        let pace = woken.or_else(|| next(Pace::Slowing, Pace::Slow)).or_else(|| next(Pace::Quick, Pace::Slowing));
        // Before the ticks to come.
        fence(Ordering::Release);
        // One that calls at this moment wakes the thread as soon as it is parked.
        pace.unwrap_or(Pace::Slow)
    }
}

// === impl Ticker ===

impl Ticker {
    /// Starts the thread; it ends with the engine.
    pub(crate) fn start(engine: &Engine) -> std::io::Result<Self> {
        Self::start_at(engine, TICK, SLOW_TICK)
    }

    /// The same where the first tick is of this length, the slow one or the other.
    fn start_at(engine: &Engine, first_tick: Duration, slow_tick: Duration) -> std::io::Result<Self> {
        let pace = if first_tick == slow_tick { Pace::Slow } else { Pace::Quick };
        let (beat, engine) = (Arc::new(Beat { pace: AtomicU8::new(pace as u8) }), engine.weak());
        let of_thread = Arc::clone(&beat);
        let thread = std::thread::Builder::new().name("wasm-epoch".into()).spawn(move || {
            let (mut n_ticks, mut tick) = (0, first_tick);
            while let Some(engine) = engine.upgrade() {
                engine.increment_epoch();
                drop(engine);
                n_ticks += 1;
                if n_ticks >= LULL || tick == slow_tick {
                    n_ticks = 0;
                    tick = if of_thread.lull() == Pace::Slow { slow_tick } else { TICK };
                }
                std::thread::park_timeout(tick);
            }
        })?;
        Ok(Self { beat, thread: thread.thread().clone() })
    }

    /// A guest is about to run, or does; once the deadline of its store is set.
    #[inline]
    pub(crate) fn heard(&self) {
        if self.beat.heard() {
            self.thread.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_slow_after_two_lulls_without_a_call_and_woken_by_the_next() {
        // `.` a lull, `c` a call; the pace after each, and whether the call wakes the thread.
        let mut seen = String::new();
        let beat = Beat::default();
        for step in ". . . c c . c . c . . c".split(' ') {
            seen.push_str(match step {
                "." => match beat.lull() {
                    Pace::Quick => "quick ",
                    Pace::Slowing => "slowing ",
                    Pace::Slow => "slow ",
                    Pace::Waking => "waking ",
                },
                _ if beat.heard() => "wake ",
                _ => "- ",
            });
        }
        assert_eq!(seen, "slowing slow slow wake wake quick - slowing - slowing slow wake ");
    }

    #[test]
    fn a_guest_that_is_called_after_a_lull_meets_a_tick() {
        let engine = crate::engine::compiler().expect("an engine");
        const HOUR: Duration = Duration::from_secs(3_600);
        let ticker = Ticker::start_at(&engine, HOUR, HOUR).expect("a thread");
        let mut store = wasmtime::Store::new(&engine, ());
        // (module (func (export "f") (loop (br 0))))
        let module = b"\0asm\x01\0\0\0\x01\x04\x01\x60\0\0\x03\x02\x01\0\x07\x05\x01\x01f\0\0\x0a\x09\x01\x07\0\x03\x40\x0c\0\x0b\x0b";
        let module = wasmtime::Module::new(&engine, module).expect("a module");
        let instance = wasmtime::Instance::new(&mut store, &module, &[]).expect("an instance");
        store.epoch_deadline_trap();
        // The first tick is that of a thread that starts; only who wakes it gets another within the hour.
        store.set_epoch_deadline(2);
        ticker.heard();
        let f = instance.get_typed_func::<(), ()>(&mut store, "f").expect("a function");
        f.call(&mut store, ()).expect_err("it has no other end");
    }
}
