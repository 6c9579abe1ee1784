//! Row counts for which the decode step is captured as a graph, and which of them a step takes.
//!
//! A graph's grids are fixed when it is captured, so a step of `n` rows runs in the smallest bucket that holds it; the rows
//! beyond `n` read nothing and write nowhere. Fine steps where steps are short, coarse ones where a row more costs little.

use pointsman_sched::execute::StepPlan;

/// Buckets up to 128 rows; beyond, one every 64.
const FINE: [usize; 11] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128];

/// Ascending row counts, the last of which is the most rows that a step may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buckets(Vec<usize>);

/// How a step is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepShape {
    /// One token a row: the graph of this bucket.
    Decode {
        /// Rows of the graph.
        bucket: usize,
    },
    /// With prefill chunks: launched kernel by kernel, with grids for exactly this step.
    Mixed {
        /// Rows of the step.
        rows: usize,
        /// Tokens of the step.
        tokens: usize,
    },
}

impl Buckets {
    /// The buckets for steps of at most `max_rows` rows.
    #[must_use]
    pub fn up_to(max_rows: usize) -> Self {
        let coarse = (1..).map(|i| 128 + 64 * i);
        let below = FINE.into_iter().chain(coarse).take_while(|&rows| rows < max_rows);
        Self(below.chain([max_rows]).collect())
    }

    /// The smallest bucket that holds `rows`; `None` when none does.
    #[must_use]
    pub fn holding(&self, rows: usize) -> Option<usize> {
        self.0.get(self.0.partition_point(|&bucket| bucket < rows)).copied()
    }

    /// The order in which graphs are captured: the largest first, so that smaller ones reuse what it reserved.
    pub fn largest_first(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().rev().copied()
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// How to run a step that is not empty and within the engine's bounds.
    #[must_use]
    pub fn shape(&self, plan: &StepPlan) -> StepShape {
        let (rows, tokens) = (plan.rows.len(), plan.tokens.len());
        match self.holding(rows) {
            Some(bucket) if rows == tokens => StepShape::Decode { bucket },
            _ => StepShape::Mixed { rows, tokens },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_end_at_the_bound() {
        for (max_rows, expect) in [
            (1, vec![1]),
            (2, vec![1, 2]),
            (5, vec![1, 2, 4, 5]),
            (64, vec![1, 2, 4, 8, 16, 24, 32, 48, 64]),
            (128, FINE.to_vec()),
            (200, [FINE.as_slice(), &[192, 200]].concat()),
            (256, [FINE.as_slice(), &[192, 256]].concat()),
        ] {
            let buckets = Buckets::up_to(max_rows);
            assert_eq!(buckets.0, expect);
            assert_eq!(buckets.largest_first().next(), Some(max_rows));
            assert_eq!(buckets.count(), expect.len());
        }
    }

    #[test]
    fn a_step_takes_the_smallest_bucket_that_holds_it() {
        for max_rows in [1, 5, 40, 128, 200, 1_000] {
            let buckets = Buckets::up_to(max_rows);
            for rows in 1..=max_rows {
                let bucket = buckets.holding(rows).expect("every allowed step has one");
                assert!(bucket >= rows && bucket <= max_rows);
                assert!(buckets.0.iter().all(|&other| other < rows || other >= bucket));
            }
            assert_eq!(buckets.holding(max_rows + 1), None);
        }
    }

    #[test]
    fn prefill_is_never_padded() {
        use pointsman_sched::execute::Row;
        use pointsman_sched::ids::RequestId;
        let buckets = Buckets::up_to(40);
        for (lens, expect) in [
            (vec![1], StepShape::Decode { bucket: 1 }),
            (vec![1; 3], StepShape::Decode { bucket: 4 }),
            (vec![1; 33], StepShape::Decode { bucket: 40 }),
            (vec![2], StepShape::Mixed { rows: 1, tokens: 2 }),
            (vec![1, 7, 1], StepShape::Mixed { rows: 3, tokens: 9 }),
        ] {
            let mut plan = StepPlan::default();
            for len in lens {
                let start = plan.tokens.len() as u32;
                plan.tokens.extend(vec![0; len]);
                let tokens = start..plan.tokens.len() as u32;
                plan.rows.push(Row {
                    request: RequestId(1),
                    tokens,
                    position: 0,
                    blocks: 0..1,
                    sample: None,
                    drafts: 0,
                });
            }
            assert_eq!(buckets.shape(&plan), expect);
        }
    }
}
