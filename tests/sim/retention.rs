//! A retention policy that ranks at random, now and then wrongly, and checks what it is shown. Half of all histories have it,
//! whatever else they are about: no order of eviction may break the books, or change an answer.

use pointsman_sched::batch::Attention;
use pointsman_sched::ids::Micros;
use pointsman_sched::retention::{
    BadRanking, BlockColumns, MAX_ROWS, NativeRetention, Ranking, RetentionPolicy, check_ranking,
};

use crate::rng::Rng;

/// The retention policy of a history.
pub(crate) fn of_seed(seed: u64) -> Box<dyn RetentionPolicy> {
    if seed.is_multiple_of(2) {
        Box::new(Shuffler { rng: Rng::new(seed ^ 0x7368_656c_6600), spoiled: false })
    } else {
        Box::new(NativeRetention)
    }
}

struct Shuffler {
    rng: Rng,
    /// The last ranking was wrong on purpose.
    spoiled: bool,
}

impl RetentionPolicy for Shuffler {
    fn attend(&mut self, _now: Micros) -> Attention {
        match self.rng.below(40) {
            0 => Attention::Native,
            1 => Attention::NeedsView,
            _ => Attention::Following,
        }
    }

    fn rank(&mut self, now: Micros, wanted: u32, blocks: &BlockColumns, ranking: &mut Ranking) -> bool {
        assert!(wanted > 0 && (1..=MAX_ROWS).contains(&blocks.len()));
        assert!(blocks.last_used.is_sorted(), "the host's own order");
        assert!(blocks.last_used.iter().zip(&blocks.created).all(|(used, created)| created <= used && *used <= now));
        for row in 0..u32::try_from(blocks.len()).expect("few rows") {
            let list = self.rng.pick(&[Some(true), Some(false), None]);
            let Some(evict) = list else { continue };
            let list = if evict { &mut ranking.evict } else { &mut ranking.keep };
            let place = self.rng.below(list.len() as u64 + 1);
            list.insert(usize::try_from(place).expect("an index"), row);
        }
        self.spoiled = self.rng.chance(50_000);
        if self.spoiled {
            ranking.evict.push(ranking.keep.first().copied().unwrap_or(u32::MAX));
        }
        assert_eq!(check_ranking(ranking, blocks.len(), &mut Vec::new()).is_err(), self.spoiled);
        self.rng.chance(900_000)
    }

    fn refused(&mut self, _now: Micros, why: BadRanking) {
        assert!(self.spoiled, "{why}");
    }
}
