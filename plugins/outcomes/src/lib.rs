//! The table that `hook-outcomes` writes to the host's state and `route-bandit` reads: what requests cost on each replica.
//!
//! A crate of its own, because a guest cannot link another one: both would export `init`. One key for all replicas, so that
//! a reader asks the host once. Old outcomes fade, so that a replica that has become slow is found out, and one that nobody
//! has asked for long is asked again.

/// The key.
pub const KEY: &str = "outcomes";
/// `state-schema` of both policies: the layout of the value.
pub const STATE_SCHEMA: u32 = 2;
/// Most replicas in the table, of 28 bytes each; a value holds 64 KiB. Outcomes of others are not kept.
pub const MAX_REPLICAS: usize = 1_024;

/// Below this weight an outcome is forgotten.
const FORGOTTEN: f64 = 0.01;
/// What a step costs whatever its batch, in requests of the batch; of the order of every device that reads its weights once
/// per step.
const STEP_REQUESTS: f64 = 4.0;

/// How much slower a request is served among so many in the batch, itself included. Costs are kept without it, so that what
/// was learned under one load is good under another.
#[must_use]
pub fn crowding(batch: u32) -> f64 {
    STEP_REQUESTS + f64::from(batch)
}

/// What requests cost on a replica lately, each weighted by its age.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// `replicas.id` of the package.
    pub replica: u32,
    /// How many, in sum of their weights.
    pub n: f64,
    /// Mean of the costs.
    pub mean: f64,
    /// Sum of the squared distances from the mean.
    pub squares: f64,
}

/// Outcomes by replica, in order of their numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    rows: Vec<Outcome>,
}

impl Table {
    /// The table in a value of the store; a tail that is no whole row is left out.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Self {
        let rows = bytes.as_chunks::<28>().0.iter().map(|row| {
            let float = |at: usize| f64::from_le_bytes(std::array::from_fn(|i| row[at + i]));
            let replica = u32::from_le_bytes(std::array::from_fn(|i| row[i]));
            Outcome { replica, n: float(4), mean: float(12), squares: float(20) }
        });
        Self { rows: rows.collect() }
    }

    /// The value that [`decode`](Self::decode) reads.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(28 * self.rows.len());
        for row in &self.rows {
            bytes.extend_from_slice(&row.replica.to_le_bytes());
            for float in [row.n, row.mean, row.squares] {
                bytes.extend_from_slice(&float.to_le_bytes());
            }
        }
        bytes
    }

    /// Replicas with outcomes.
    #[must_use]
    pub fn rows(&self) -> &[Outcome] {
        &self.rows
    }

    /// What is known of a replica.
    #[must_use]
    pub fn get(&self, replica: u32) -> Option<&Outcome> {
        self.rows.binary_search_by_key(&replica, |row| row.replica).ok().map(|at| &self.rows[at])
    }

    /// Counts one more request (Welford's update: the sum of squares of large numbers would lose the small ones).
    pub fn add(&mut self, replica: u32, cost: f64) {
        let at = match self.rows.binary_search_by_key(&replica, |row| row.replica) {
            Ok(at) => at,
            Err(_) if self.rows.len() >= MAX_REPLICAS => return,
            Err(at) => {
                self.rows.insert(at, Outcome { replica, ..Outcome::default() });
                at
            }
        };
        let row = &mut self.rows[at];
        row.n += 1.0;
        let distance = cost - row.mean;
        row.mean += distance / row.n;
        row.squares += distance * (cost - row.mean);
    }

    /// Lets every outcome keep this share of its weight.
    pub fn fade(&mut self, keep: f64) {
        for row in &mut self.rows {
            row.n *= keep;
            row.squares *= keep;
        }
        self.rows.retain(|row| row.n > FORGOTTEN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_become_a_mean_and_survive_the_store() {
        let mut table = Table::default();
        for (replica, cost) in [(7, 10.0), (3, 5.0), (7, 14.0), (7, 12.0)] {
            table.add(replica, cost);
        }
        let seven = Outcome { replica: 7, n: 3.0, mean: 12.0, squares: 8.0 };
        assert_eq!((table.get(7), table.get(4)), (Some(&seven), None));
        assert_eq!(table.rows().iter().map(|row| row.replica).collect::<Vec<_>>(), [3, 7]);
        let mut bytes = table.encode();
        assert_eq!(Table::decode(&bytes), table);
        bytes.truncate(40);
        assert_eq!(Table::decode(&bytes).rows().len(), 1);
    }

    #[test]
    fn the_old_fades_and_is_forgotten_and_the_table_is_bounded() {
        let mut table = Table::default();
        table.add(1, 10.0);
        table.fade(0.5);
        table.add(1, 40.0);
        assert_eq!(table.get(1).map(|row| (row.n, row.mean)), Some((1.5, 30.0)));
        table.fade(0.001);
        assert_eq!(table.rows(), []);
        (0..2_000).for_each(|replica| table.add(replica, 1.0));
        assert_eq!(table.rows().len(), MAX_REPLICAS);
    }
}
