//! `host-state`: what a policy may keep across swaps, in memory, bounded in every direction.
//!
//! A namespace belongs to a name and a layout (`state-schema`), so that a revision never reads what another layout wrote.
//! One lock per namespace, held for a map operation and never across a guest call. The store lives as long as the host;
//! making it durable is not the guests' concern and not done here.
//!
//! A generation reaches its namespace through a [`StateView`], because one that is tried must not write where the active
//! policy reads: an arm of an experiment works on a copy, unless the namespace is one that the operator named for several
//! slots; a shadow, whose decisions never happen, writes to an overlay or a draft that is thrown away.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pointsman_telemetry::Micros;

/// Most keys in a namespace.
pub(crate) const MAX_KEYS: usize = 1_024;
/// Longest key, in bytes.
pub(crate) const MAX_KEY_BYTES: usize = 256;
/// Longest value, in bytes.
pub(crate) const MAX_VALUE_BYTES: usize = 64 << 10;
/// Keys and values of a namespace together, in bytes.
pub const MAX_NAMESPACE_BYTES: usize = 4 << 20;
/// Most namespaces; at the bound, those that no instance uses go first.
const MAX_NAMESPACES: usize = 64;
/// Copies of copies that a lineage remembers: rollouts in a row that one request may outlive.
const MAX_ANCESTORS: usize = 8;

/// All namespaces of a host.
#[derive(Debug, Default)]
pub(crate) struct StateStore {
    namespaces: Mutex<HashMap<NamespaceKey, Arc<Namespace>>>,
    /// Numbers of lineages that were given.
    lineages: AtomicU64,
}

/// A name and a layout.
type NamespaceKey = (Arc<str>, u32);

/// The keys of one policy, or of several that share a name.
#[derive(Debug, Default)]
pub(crate) struct Namespace {
    entries: Mutex<Entries>,
}

/// What the host-state calls of one generation reach.
#[derive(Debug, Default)]
pub(crate) struct StateView {
    live: Arc<Namespace>,
    sharing: Sharing,
    own: Mutex<Own>,
}

/// Whose namespace it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// The slot's own.
    #[default]
    Slot,
    /// Named by the operator, so that several slots meet there: a candidate that worked on a copy would not hear what the
    /// others write, and its copy would undo that when it is adopted.
    Named,
}

/// What a view has beside the namespace; bounded like one.
#[derive(Debug, Default)]
enum Own {
    /// Nothing: calls reach the namespace.
    #[default]
    Nothing,
    /// The namespace as it was at some moment, and what was written since: an arm of an experiment.
    Copy(Entries),
    /// What was written and deleted; the rest reads through: a shadow.
    Overlay(Overlay),
    /// A copy that is thrown away: a shadow that counts what it would have let in.
    Draft(Entries),
}

#[derive(Debug, Default)]
struct Overlay {
    written: Entries,
    /// Keys of the namespace that are gone for the shadow, unless it wrote them again.
    deleted: HashSet<String>,
}

#[derive(Clone, Debug, Default)]
struct Entries {
    map: HashMap<String, Vec<u8>>,
    /// Keys and values together.
    bytes: usize,
    lineage: Lineage,
}

/// Which writes are in a state: those to itself, and those to what it was copied from, up to the copy.
#[derive(Clone, Debug, Default)]
struct Lineage {
    /// Its own number; 0 for none.
    number: u64,
    /// What it was copied from and when, the latest last.
    copied: Vec<(u64, Micros)>,
}

/// Why a value was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StateFault {
    /// No room for another key, or not enough bytes left.
    Full,
    /// The key or the value alone is over its bound.
    TooLarge,
}

// === impl StateStore ===

impl StateStore {
    /// The namespace for a name and a layout; `None` when there are too many in use.
    pub(crate) fn open(&self, name: &Arc<str>, schema: u32) -> Option<Arc<Namespace>> {
        let mut namespaces = self.namespaces.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (Arc::clone(name), schema);
        if !namespaces.contains_key(&key) && namespaces.len() >= MAX_NAMESPACES {
            namespaces.retain(|_, namespace| Arc::strong_count(namespace) > 1);
            if namespaces.len() >= MAX_NAMESPACES {
                return None;
            }
        }
        Some(Arc::clone(namespaces.entry(key).or_insert_with(|| {
            let entries =
                Entries { lineage: Lineage { number: self.number(), copied: Vec::new() }, ..Entries::default() };
            Arc::new(Namespace { entries: Mutex::new(entries) })
        })))
    }

    /// A number for a lineage, never given before and not 0.
    pub(crate) fn number(&self) -> u64 {
        self.lineages.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Whether some namespace [holds](StateView::holds) a write and none of the later ones.
    pub(crate) fn holds(&self, write: (u64, Micros), later: &[(u64, Micros)]) -> bool {
        let namespaces = self.namespaces.lock().unwrap_or_else(PoisonError::into_inner);
        namespaces.values().any(|namespace| namespace.entries().lineage.holds_but(write, later))
    }
}

// === impl Lineage ===

impl Lineage {
    fn holds(&self, (number, at): (u64, Micros)) -> bool {
        number == self.number || self.copied.iter().any(|&(from, until)| from == number && at <= until)
    }

    fn holds_but(&self, write: (u64, Micros), later: &[(u64, Micros)]) -> bool {
        self.holds(write) && !later.iter().any(|&later| self.holds(later))
    }

    /// Of a copy that is made now.
    fn copied(mut self, number: u64, now: Micros) -> Self {
        if self.copied.len() == MAX_ANCESTORS {
            self.copied.remove(0);
        }
        self.copied.push((self.number, now));
        Self { number, copied: self.copied }
    }
}

// === impl Namespace ===

impl Namespace {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl StateView ===

impl StateView {
    pub(crate) fn new(live: Arc<Namespace>, sharing: Sharing) -> Self {
        Self { live, sharing, own: Mutex::default() }
    }

    // Locks nest in this order: own, then the namespace.
    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on a copy from `now` on, if it has nothing of its own yet and the namespace is the slot's own; `number` is that of the copy.
    pub(crate) fn fork(&self, number: u64, now: Micros) {
        let mut own = self.own();
        if self.sharing == Sharing::Slot && matches!(*own, Own::Nothing) {
            *own = Own::Copy(self.copied(number, now));
        }
    }

    /// Works on a copy from `now` on that nobody else will ever see, whosever namespace it is.
    pub(crate) fn draft(&self, number: u64, now: Micros) {
        *self.own() = Own::Draft(self.copied(number, now));
    }

    fn copied(&self, number: u64, now: Micros) -> Entries {
        let mut copy = self.live.entries().clone();
        copy.lineage = copy.lineage.copied(number, now);
        copy
    }

    /// Whether what is written is thrown away.
    pub(crate) fn is_draft(&self) -> bool {
        matches!(*self.own(), Own::Draft(_))
    }

    /// Number of the state that calls reach now; an overlay is a part of the namespace's.
    pub(crate) fn number(&self) -> u64 {
        match &*self.own() {
            Own::Nothing | Own::Overlay(_) => self.live.entries().lineage.number,
            Own::Copy(entries) | Own::Draft(entries) => entries.lineage.number,
        }
    }

    /// Whether what was written to the state of a number at some time is in here, and none of what was written later.
    pub(crate) fn holds(&self, write: (u64, Micros), later: &[(u64, Micros)]) -> bool {
        match &*self.own() {
            Own::Nothing | Own::Overlay(_) => self.live.entries().lineage.holds_but(write, later),
            Own::Copy(entries) | Own::Draft(entries) => entries.lineage.holds_but(write, later),
        }
    }

    /// Reads through from now on, and keeps what it writes to itself.
    pub(crate) fn overlay(&self) {
        *self.own() = Own::Overlay(Overlay::default());
    }

    /// Makes its copy the namespace, for whoever else uses that, too; an overlay and a draft are thrown away.
    pub(crate) fn adopt(&self) {
        let mut own = self.own();
        if let Own::Copy(entries) = std::mem::take(&mut *own) {
            *self.live.entries() = entries;
        }
    }

    /// Bytes that its keys and values take: of what it has of its own, else of the namespace.
    pub(crate) fn bytes(&self) -> usize {
        match &*self.own() {
            Own::Nothing => self.live.entries().bytes,
            Own::Copy(entries) | Own::Draft(entries) => entries.bytes,
            Own::Overlay(overlay) => overlay.written.bytes + overlay.deleted.iter().map(String::len).sum::<usize>(),
        }
    }

    pub(crate) fn get(&self, key: &str) -> Option<Vec<u8>> {
        match &*self.own() {
            Own::Nothing => self.live.entries().get(key).map(<[u8]>::to_vec),
            Own::Copy(entries) | Own::Draft(entries) => entries.get(key).map(<[u8]>::to_vec),
            Own::Overlay(overlay) => overlay.get(key, &self.live.entries()).map(<[u8]>::to_vec),
        }
    }

    pub(crate) fn set(&self, key: String, value: Vec<u8>) -> Result<(), StateFault> {
        match &mut *self.own() {
            Own::Nothing => self.live.entries().set(key, value),
            Own::Copy(entries) | Own::Draft(entries) => entries.set(key, value),
            Own::Overlay(overlay) => overlay.written.set(key, value),
        }
    }

    /// Stores `value` if the key holds `expected`; says whether it did.
    pub(crate) fn compare_and_set(
        &self,
        key: String,
        expected: Option<&[u8]>,
        value: Vec<u8>,
    ) -> Result<bool, StateFault> {
        match &mut *self.own() {
            Own::Nothing => self.live.entries().compare_and_set(key, expected, value),
            Own::Copy(entries) | Own::Draft(entries) => entries.compare_and_set(key, expected, value),
            Own::Overlay(overlay) => {
                if overlay.get(&key, &self.live.entries()) != expected {
                    return Ok(false);
                }
                overlay.written.set(key, value).map(|()| true)
            }
        }
    }

    pub(crate) fn delete(&self, key: &str) {
        match &mut *self.own() {
            Own::Nothing => self.live.entries().delete(key),
            Own::Copy(entries) | Own::Draft(entries) => entries.delete(key),
            Own::Overlay(overlay) => overlay.delete(key, &self.live.entries()),
        }
    }
}

// === impl Overlay ===

impl Overlay {
    fn get<'a>(&'a self, key: &str, live: &'a Entries) -> Option<&'a [u8]> {
        let own = self.written.get(key);
        if own.is_some() || self.deleted.contains(key) { own } else { live.get(key) }
    }

    fn delete(&mut self, key: &str, live: &Entries) {
        self.written.delete(key);
        if live.get(key).is_none() {
            return;
        }
        if self.deleted.len() >= MAX_KEYS {
            // There are never so many keys to hide: the others have gone by themselves.
            self.deleted.retain(|deleted| live.get(deleted).is_some());
        }
        self.deleted.insert(key.to_owned());
    }
}

// === impl Entries ===

impl Entries {
    fn get(&self, key: &str) -> Option<&[u8]> {
        self.map.get(key).map(Vec::as_slice)
    }

    fn set(&mut self, key: String, value: Vec<u8>) -> Result<(), StateFault> {
        if key.len() > MAX_KEY_BYTES || value.len() > MAX_VALUE_BYTES {
            return Err(StateFault::TooLarge);
        }
        let old = self.map.get(&key).map(|old| key.len() + old.len());
        let bytes = self.bytes - old.unwrap_or(0) + key.len() + value.len();
        if bytes > MAX_NAMESPACE_BYTES || (old.is_none() && self.map.len() >= MAX_KEYS) {
            return Err(StateFault::Full);
        }
        self.bytes = bytes;
        self.map.insert(key, value);
        Ok(())
    }

    fn compare_and_set(&mut self, key: String, expected: Option<&[u8]>, value: Vec<u8>) -> Result<bool, StateFault> {
        if self.get(&key) != expected {
            return Ok(false);
        }
        self.set(key, value).map(|()| true)
    }

    fn delete(&mut self, key: &str) {
        if let Some(value) = self.map.remove(key) {
            self.bytes -= key.len() + value.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_bounded_in_every_direction() {
        let space = StateView::default();
        for (key, value, expect) in [
            ("k".repeat(MAX_KEY_BYTES), 1, Ok(())),
            ("k".repeat(MAX_KEY_BYTES + 1), 1, Err(StateFault::TooLarge)),
            ("v".into(), MAX_VALUE_BYTES, Ok(())),
            ("v".into(), MAX_VALUE_BYTES + 1, Err(StateFault::TooLarge)),
        ] {
            assert_eq!(space.set(key, vec![0; value]), expect, "{value}");
        }
        let space = StateView::default();
        let room = MAX_NAMESPACE_BYTES / (MAX_VALUE_BYTES + 4);
        for i in 0..room {
            assert_eq!(space.set(format!("{i:04}"), vec![0; MAX_VALUE_BYTES]), Ok(()), "{i}");
        }
        assert_eq!(space.set("next".into(), vec![0; MAX_VALUE_BYTES]), Err(StateFault::Full));
        space.delete("0000");
        assert_eq!(space.set("next".into(), vec![0; MAX_VALUE_BYTES]), Ok(()), "deleting makes room");
        assert_eq!(space.set("next".into(), vec![1]), Ok(()), "so does shrinking");
        let space = StateView::default();
        for i in 0..MAX_KEYS {
            assert_eq!(space.set(i.to_string(), Vec::new()), Ok(()));
        }
        assert_eq!(space.set("one more".into(), Vec::new()), Err(StateFault::Full));
        assert_eq!(space.set("0".into(), vec![1]), Ok(()), "replacing needs no new key");
    }

    #[test]
    fn compare_and_set_compares() {
        let space = StateView::default();
        for (expected, value, expect) in
            [(Some(&b"x"[..]), b"a", false), (None, b"a", true), (None, b"b", false), (Some(b"a"), b"b", true)]
        {
            assert_eq!(space.compare_and_set("k".into(), expected, value.to_vec()), Ok(expect), "{expected:?}");
        }
        assert_eq!(space.get("k"), Some(b"b".to_vec()));
    }

    #[test]
    fn namespaces_differ_by_name_and_layout_and_unused_ones_make_room() {
        let store = StateStore::default();
        let name: Arc<str> = "router".into();
        let open = |schema| StateView::new(store.open(&name, schema).expect("room"), Sharing::Slot);
        open(1).set("k".into(), vec![1]).expect("room");
        assert_eq!(open(1).get("k"), Some(vec![1]), "survives its users");
        assert_eq!(open(2).get("k"), None);
        let held: Vec<_> = (0..MAX_NAMESPACES as u32).map_while(|i| store.open(&"other".into(), i)).collect();
        assert_eq!(held.len(), MAX_NAMESPACES);
        assert!(store.open(&"one more".into(), 0).is_none());
        drop(held);
        assert!(store.open(&"one more".into(), 0).is_some());
    }

    #[test]
    fn what_is_tried_writes_where_nobody_reads() {
        let live = Arc::new(Namespace::default());
        let active = StateView::new(Arc::clone(&live), Sharing::Slot);
        for key in ["a", "b", "c"] {
            active.set(key.into(), vec![1]).expect("room");
        }
        let tried = StateView::new(live, Sharing::Slot);
        tried.fork(9, 5);
        tried.set("a".into(), vec![2]).expect("room");
        tried.delete("b");
        assert_eq!(tried.compare_and_set("c".into(), Some(&[1]), vec![3]), Ok(true));
        assert_eq!(["a", "b", "c"].map(|key| tried.get(key)), [Some(vec![2]), None, Some(vec![3])]);
        assert_eq!(["a", "b", "c"].map(|key| active.get(key)), [Some(vec![1]), Some(vec![1]), Some(vec![1])]);
        active.set("d".into(), vec![9]).expect("room");
        assert_eq!(tried.get("d"), None);
        tried.adopt();
        assert_eq!((active.get("a"), tried.get("a")), (Some(vec![2]), Some(vec![2])), "one namespace again");
    }

    #[test]
    fn a_copy_holds_what_was_written_before_it() {
        let store = StateStore::default();
        let live = store.open(&"admission".into(), 0).expect("room");
        let active = StateView::new(Arc::clone(&live), Sharing::Slot);
        let base = active.number();
        let tried = StateView::new(live, Sharing::Slot);
        tried.fork(store.number(), 10);
        let copy = tried.number();
        for (write, later, in_active, in_tried) in [
            ((base, 5), &[][..], true, true),
            ((base, 10), &[], true, true),
            ((base, 11), &[], true, false),
            ((copy, 12), &[], false, true),
            ((0, 1), &[], false, false),
            ((base, 5), &[(base, 9)], false, false),
            ((base, 5), &[(base, 11)], false, true),
            ((base, 5), &[(base, 11), (copy, 11)], false, false),
        ] {
            let found = (active.holds(write, later), tried.holds(write, later));
            assert_eq!(found, (in_active, in_tried), "{write:?} {later:?}");
        }
        assert!(!store.holds((copy, 12), &[]), "a copy is no namespace");
        tried.adopt();
        assert_eq!((active.number(), active.holds((base, 11), &[])), (copy, false), "the copy took its place");
        assert!(store.holds((copy, 12), &[]) && store.holds((base, 5), &[]) && !store.holds((base, 11), &[]));
    }

    #[test]
    fn a_shadow_reads_through_and_writes_where_nobody_reads() {
        for sharing in [Sharing::Slot, Sharing::Named] {
            let live = Arc::new(Namespace::default());
            let active = StateView::new(Arc::clone(&live), sharing);
            for key in ["a", "b", "c"] {
                active.set(key.into(), vec![1]).expect("room");
            }
            let shadow = StateView::new(live, sharing);
            shadow.overlay();
            shadow.fork(9, 5);
            shadow.set("a".into(), vec![2]).expect("room");
            shadow.delete("b");
            assert_eq!(shadow.compare_and_set("c".into(), Some(&[9]), vec![3]), Ok(false), "{sharing:?}");
            assert_eq!(shadow.compare_and_set("c".into(), Some(&[1]), vec![3]), Ok(true), "{sharing:?}");
            active.set("d".into(), vec![4]).expect("room");
            let seen = ["a", "b", "c", "d"].map(|key| shadow.get(key));
            assert_eq!(seen, [Some(vec![2]), None, Some(vec![3]), Some(vec![4])], "{sharing:?}");
            let untouched = ["a", "b", "c"].map(|key| active.get(key));
            assert_eq!(untouched, [Some(vec![1]), Some(vec![1]), Some(vec![1])], "{sharing:?}");
            assert_eq!(shadow.compare_and_set("b".into(), None, vec![5]), Ok(true), "a deleted key can come back");
            assert_eq!(shadow.get("b"), Some(vec![5]));
            shadow.delete("b");
            assert_eq!((shadow.get("b"), shadow.bytes()), (None, 2 + 2 + 1), "{sharing:?}");
            shadow.adopt();
            assert_eq!(shadow.get("a"), Some(vec![1]), "{sharing:?}: thrown away");
        }
    }

    #[test]
    fn an_overlay_is_bounded_and_forgets_deletions_that_hide_nothing() {
        let live = Arc::new(Namespace::default());
        let (active, shadow) = (StateView::new(Arc::clone(&live), Sharing::Slot), StateView::new(live, Sharing::Slot));
        shadow.overlay();
        for i in 0..3 * MAX_KEYS {
            active.set(i.to_string(), vec![1]).expect("room");
            shadow.delete(&i.to_string());
            assert_eq!(shadow.get(&i.to_string()), None);
            active.delete(&i.to_string());
        }
        assert!(shadow.bytes() <= MAX_KEYS * MAX_KEY_BYTES, "{}", shadow.bytes());
        for i in 0..MAX_KEYS {
            assert_eq!(shadow.set(i.to_string(), Vec::new()), Ok(()));
        }
        assert_eq!(shadow.set("one more".into(), Vec::new()), Err(StateFault::Full));
    }

    #[test]
    fn a_shared_namespace_stays_one() {
        let live = Arc::new(Namespace::default());
        let (teacher, tried) =
            (StateView::new(Arc::clone(&live), Sharing::Named), StateView::new(live, Sharing::Named));
        tried.fork(9, 5);
        teacher.set("lesson".into(), vec![1]).expect("room");
        assert_eq!(tried.get("lesson"), Some(vec![1]));
        tried.adopt();
        assert_eq!(teacher.get("lesson"), Some(vec![1]));
    }

    #[test]
    fn copies_are_bounded_and_counted() {
        let view = StateView::default();
        view.fork(9, 5);
        for i in 0..MAX_KEYS {
            assert_eq!(view.set(i.to_string(), vec![0; 10]), Ok(()));
        }
        assert_eq!(view.set("one more".into(), Vec::new()), Err(StateFault::Full));
        assert_eq!(view.bytes(), (0..MAX_KEYS).map(|i| i.to_string().len() + 10).sum::<usize>());
    }
}
