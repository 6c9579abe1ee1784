//! Compiled forms that are kept for the next request that asks for the same: a service sends one schema with every request.
//!
//! Known by a digest of the form and by the tokenizer that it was compiled for. Who asks while another has it compiled waits for
//! that; where that one leaves, one of those who wait goes on. What is wrong with a form is kept as well, what passes with
//! time is not. Bounds on number and bytes: the one that was used longest ago goes. Texts under way hold their form themselves,
//! and work on copies of its state, so what is kept is never waited for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use pointsman_telemetry::FormMetrics;
use tokio::sync::OnceCell;

use super::{Compiled, GrammarError};
use crate::cache::Key;
use crate::text::TextModel;

/// What a form came to, once somebody has had it compiled.
pub(super) type Place = Arc<OnceCell<Outcome>>;

pub(super) type Outcome = Result<Arc<Compiled>, GrammarError>;

/// A tokenizer, by the address that nobody else has while its entry is there, and a form.
type Id = (usize, Key);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Kept {
    most: usize,
    most_bytes: usize,
    metrics: FormMetrics,
    forms: Mutex<Forms>,
}

#[derive(Debug, Default)]
struct Forms {
    by_id: HashMap<Id, Entry>,
    bytes: usize,
    /// Counts uses.
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    place: Place,
    /// Keeps the address from being another's.
    text: Weak<TextModel>,
    used: u64,
    bytes: usize,
}

// === impl Kept ===

impl Kept {
    pub(super) fn new(most: usize, most_bytes: usize, metrics: FormMetrics) -> Self {
        Self { most, most_bytes, metrics, forms: Mutex::default() }
    }

    /// The place of a form, where it is or will be.
    pub(super) fn find(&self, text: &Arc<TextModel>, key: Key) -> Place {
        let mut forms = self.forms();
        // Of a model that has gone nobody asks again.
        forms.drop_where(|entry| entry.text.strong_count() == 0);
        forms.clock += 1;
        let clock = forms.clock;
        let place = match forms.by_id.get_mut(&(Arc::as_ptr(text) as usize, key)) {
            Some(entry) => {
                let counter = if entry.place.initialized() {
                    &self.metrics.hits
                } else if entry.is_awaited() {
                    &self.metrics.joined
                } else {
                    &self.metrics.misses
                };
                counter.inc();
                entry.used = clock;
                Arc::clone(&entry.place)
            }
            None => {
                self.metrics.misses.inc();
                let place = Place::default();
                if forms.shrink_to(self.most.saturating_sub(1), self.most_bytes) {
                    let entry = Entry { place: Arc::clone(&place), text: Arc::downgrade(text), used: clock, bytes: 0 };
                    forms.by_id.insert((Arc::as_ptr(text) as usize, key), entry);
                }
                place
            }
        };
        self.show(&forms);
        place
    }

    /// Takes note of what a form has come to; `bytes` is what it uses.
    pub(super) fn settle(&self, text: &Arc<TextModel>, key: Key, (outcome, bytes): (&Outcome, usize)) {
        let mut forms = self.forms();
        let id = (Arc::as_ptr(text) as usize, key);
        let passes = matches!(outcome, Err(GrammarError::Busy | GrammarError::NoMemory | GrammarError::Slow));
        if passes || bytes > self.most_bytes {
            forms.remove(&id);
        } else if let Some(entry) = forms.by_id.get_mut(&id) {
            let before = std::mem::replace(&mut entry.bytes, bytes);
            forms.bytes = forms.bytes + bytes - before;
            forms.shrink_to(self.most, self.most_bytes);
        }
        self.show(&forms);
    }

    /// Lets go of everything that nobody waits for; whether there was anything.
    pub(super) fn clear(&self) -> bool {
        let mut forms = self.forms();
        let n_before = forms.by_id.len();
        forms.drop_where(|entry| !entry.is_awaited());
        self.show(&forms);
        forms.by_id.len() < n_before
    }

    fn show(&self, forms: &Forms) {
        self.metrics.kept.set(i64::try_from(forms.by_id.len()).unwrap_or(i64::MAX));
        self.metrics.bytes.set(i64::try_from(forms.bytes).unwrap_or(i64::MAX));
    }

    fn forms(&self) -> MutexGuard<'_, Forms> {
        self.forms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Forms ===

impl Forms {
    fn remove(&mut self, id: &Id) {
        if let Some(entry) = self.by_id.remove(id) {
            self.bytes -= entry.bytes;
        }
    }

    fn drop_where(&mut self, goes: impl Fn(&Entry) -> bool) {
        let Self { by_id, bytes, .. } = self;
        by_id.retain(|_, entry| {
            let goes = goes(entry);
            *bytes -= if goes { entry.bytes } else { 0 };
            !goes
        });
    }

    /// Drops what was used longest ago; false where what is left is being compiled and cannot go.
    fn shrink_to(&mut self, most: usize, most_bytes: usize) -> bool {
        while self.by_id.len() > most || self.bytes > most_bytes {
            let free = self.by_id.iter().filter(|(_, entry)| !entry.is_awaited());
            let Some(oldest) = free.min_by_key(|(_, entry)| entry.used).map(|(id, _)| *id) else { return false };
            self.remove(&oldest);
        }
        true
    }
}

impl Entry {
    /// Whether somebody has it compiled, or waits for that.
    fn is_awaited(&self) -> bool {
        !self.place.initialized() && Arc::strong_count(&self.place) > 1
    }
}
