//! Interned names: events carry numbers, guests and dashboards want words.
//!
//! Append-only and bounded: past the limit every new name becomes `other`, which is also how client-supplied metric
//! labels stay within their cap. A lock is fine here: a name is interned once per request, off the step path.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

/// The kinds of names that are interned apart from one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NameKind {
    /// Tenants, as in API keys or `x-tenant-id`.
    Tenant,
    /// Replicas, as in `demo:f16@cpu`.
    Replica,
    /// Variants, as in `demo:f16`.
    Variant,
}

impl NameKind {
    /// The word a telemetry guest sees in `new-names`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Replica => "replica",
            Self::Variant => "variant",
        }
    }
}

/// Most names of one kind; the next ones share `other`.
const MAX_NAMES: usize = 1_000;

/// A table of names per kind. Number 0 is the empty name in every kind.
#[derive(Debug, Default)]
pub struct Names {
    tables: RwLock<HashMap<NameKind, Table>>,
}

#[derive(Debug, Default)]
struct Table {
    numbers: HashMap<Arc<str>, u32>,
    names: Vec<Arc<str>>,
}

impl Names {
    /// The number of `name`, given on first sight. Past 1,000 names of a kind the answer is that of `other`.
    pub fn intern(&self, kind: NameKind, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let known = |table: &Table, name: &str| table.numbers.get(name).copied();
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = tables.get(&kind).and_then(|table| known(table, name)) {
            return number;
        }
        drop(tables);
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let table = tables.entry(kind).or_default();
        let name = if table.names.len() < MAX_NAMES { name } else { "other" };
        known(table, name).unwrap_or_else(|| {
            let name: Arc<str> = name.into();
            table.names.push(Arc::clone(&name));
            let number = u32::try_from(table.names.len()).unwrap_or(u32::MAX);
            table.numbers.insert(name, number);
            number
        })
    }

    /// The name behind a number, empty for 0 and for a number never given.
    #[must_use]
    pub fn name(&self, kind: NameKind, number: u32) -> Arc<str> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let index = (number as usize).checked_sub(1);
        index.and_then(|i| tables.get(&kind)?.names.get(i).cloned()).unwrap_or_else(|| "".into())
    }

    /// Names of a kind with numbers above `after`, in order, for guests that mirror the table.
    #[must_use]
    pub fn since(&self, kind: NameKind, after: u32) -> Vec<(u32, Arc<str>)> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let Some(table) = tables.get(&kind) else { return Vec::new() };
        (1u32..).zip(&table.names).skip(after as usize).map(|(number, name)| (number, Arc::clone(name))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_stable_per_kind_and_capped() {
        let names = Names::default();
        assert_eq!(names.intern(NameKind::Tenant, ""), 0);
        assert_eq!(names.intern(NameKind::Tenant, "a"), 1);
        assert_eq!(names.intern(NameKind::Replica, "a"), 1);
        assert_eq!(names.intern(NameKind::Tenant, "b"), 2);
        assert_eq!(names.intern(NameKind::Tenant, "a"), 1);
        assert_eq!(&*names.name(NameKind::Tenant, 2), "b");
        assert_eq!(names.since(NameKind::Tenant, 1), vec![(2, "b".into())]);
        for i in 0..2_000 {
            names.intern(NameKind::Tenant, &format!("t{i}"));
        }
        assert_eq!(&*names.name(NameKind::Tenant, names.intern(NameKind::Tenant, "one too many")), "other");
        assert!(names.since(NameKind::Tenant, 0).len() <= MAX_NAMES + 1);
    }
}
