//! Retention and sampler policies with somebody listening: copies of what they see and say go to their taps while one records.
//!
//! Around the policies, as the scheduler's ([`crate::tapped`]), and simpler: a ranking needs no earlier one, so a line names
//! the tenants that it shows and nothing is told to the policy again. A sampler follows requests; a recording has those that
//! started in it, from their first word to their end, and none of which a line was lost.

use std::collections::BTreeSet;
use std::sync::Arc;

use pointsman_policy::SampledReplica;
use pointsman_sched::batch::Attention;
use pointsman_sched::ids::{Micros, RequestId};
use pointsman_sched::retention::{BadRanking, BlockColumns, Ranking, RetentionPolicy};
use pointsman_sched::route::DecidedBy;
use pointsman_sched::sampler::{Batch, Overheard, Reply, SamplerWorker, Word};
use pointsman_server::admin::wire::calls::{RankingSeen, RetentionLine, SamplerLine, StartedSeen, WordSeen};
use pointsman_server::admin::wire::decision::Line;
use pointsman_server::record::Tap;
use pointsman_telemetry::{NameKind, Names};

/// A retention policy and its tap.
pub(crate) struct TappedRetention<P> {
    inner: P,
    tap: Arc<Tap>,
    replica: Arc<str>,
    names: Arc<Names>,
}

/// A sampler and its tap.
pub(crate) struct TappedSampler<W> {
    inner: W,
    tap: Arc<Tap>,
    replica: SampledReplica,
    /// Number of the recording under way, as of the last reply.
    recording: u64,
    /// Requests that started in it and have not ended.
    followed: BTreeSet<u64>,
}

// === impl TappedRetention ===

impl<P: RetentionPolicy> TappedRetention<P> {
    /// Listens to `inner`, the policy of `replica`.
    pub(crate) fn new(inner: P, tap: &Arc<Tap>, replica: &Arc<str>, names: &Arc<Names>) -> Self {
        Self { inner, tap: Arc::clone(tap), replica: Arc::clone(replica), names: Arc::clone(names) }
    }
}

impl<P: RetentionPolicy> RetentionPolicy for TappedRetention<P> {
    fn attend(&mut self, now: Micros) -> Attention {
        self.inner.attend(now)
    }

    fn rank(&mut self, now: Micros, wanted: u32, blocks: &BlockColumns, ranking: &mut Ranking) -> bool {
        if self.tap.recording() == 0 {
            return self.inner.rank(now, wanted, blocks, ranking);
        }
        // Who was asked: a guest that faults is gone afterwards. The native policy is only where it has a shadow.
        let by = self.inner.decided_by();
        if by.is_native() {
            return self.inner.rank(now, wanted, blocks, ranking);
        }
        let has_ranked = self.inner.rank(now, wanted, blocks, ranking);
        let tenants: BTreeSet<u32> = blocks.tenant.iter().copied().collect();
        let name = |number| (number, self.names.name(NameKind::Tenant, number).to_string());
        let line = RetentionLine {
            replica: self.replica.to_string(),
            now,
            wanted,
            tenants: tenants.into_iter().map(name).collect(),
            blocks: BlockColumns { new_tenants: Vec::new(), ..blocks.clone() },
            answer: has_ranked.then(|| RankingSeen(ranking.clone())),
            revision: by.revision.to_string(),
            generation: by.generation,
        };
        self.tap.push(Line::Retention(Box::new(line)));
        has_ranked
    }

    fn refused(&mut self, now: Micros, why: BadRanking) {
        self.inner.refused(now, why);
    }

    fn decided_by(&self) -> DecidedBy {
        self.inner.decided_by()
    }
}

// === impl TappedSampler ===

impl<W: SamplerWorker> TappedSampler<W> {
    /// Listens to `inner`, the worker of `replica`.
    pub(crate) fn new(inner: W, tap: &Arc<Tap>, replica: SampledReplica) -> Self {
        Self { inner, tap: Arc::clone(tap), replica, recording: 0, followed: BTreeSet::new() }
    }

    fn note(&mut self, reply: &Reply) {
        let recording = self.tap.recording();
        if recording != self.recording {
            (self.recording, self.followed) = (recording, BTreeSet::new());
        }
        if recording == 0 {
            return;
        }
        let Some(by) = &reply.decided_by else { return self.followed.clear() };
        if reply.spent.fresh {
            self.followed.clear();
        }
        // Not those that ran before there was this policy.
        let fresh = reply.spent.started.iter().filter(|started| started.said.is_empty());
        self.followed.extend(fresh.map(|started| started.id.0));
        let Some(line) = self.line(reply, by) else { return };
        if !self.tap.push(Line::Sampler(Box::new(line))) {
            return self.followed.clear();
        }
        let left = reply.renewed.iter().chain(&reply.words).filter(|(_, word)| *word == Word::Leave).map(|(id, _)| id);
        for id in left.chain(&reply.spent.ended) {
            self.followed.remove(&id.0);
        }
    }

    /// What of a reply concerns the requests that are followed; none where nothing does.
    fn line(&self, reply: &Reply, by: &DecidedBy) -> Option<SamplerLine> {
        let Batch { now, started, tokens, ended, .. } = &reply.spent;
        let is_followed = |id: &RequestId| self.followed.contains(&id.0);
        let words = |words: &[(RequestId, Word)]| {
            let followed = words.iter().filter(|(id, _)| is_followed(id));
            followed.map(|(id, word)| (id.0, WordSeen(word.clone()))).collect::<Vec<_>>()
        };
        let line = SamplerLine {
            replica: self.replica.name.to_string(),
            variant: self.replica.variant.to_string(),
            vocabulary: self.replica.vocabulary,
            now: *now,
            renewed: words(&reply.renewed),
            started: started.iter().filter(|started| is_followed(&started.id)).map(StartedSeen::from).collect(),
            tokens: tokens.iter().filter(|(id, _)| is_followed(id)).map(|(id, token)| (id.0, *token)).collect(),
            ended: ended.iter().filter(|id| is_followed(id)).map(|id| id.0).collect(),
            words: words(&reply.words),
            revision: by.revision.to_string(),
            generation: by.generation,
        };
        let says_nothing = line.renewed.is_empty() && line.words.is_empty() && line.ended.is_empty();
        (!says_nothing).then_some(line)
    }
}

impl<W: SamplerWorker> SamplerWorker for TappedSampler<W> {
    fn attend(&mut self, now: Micros) -> Option<u64> {
        self.inner.attend(now)
    }

    fn send(&mut self, batch: Batch) -> Result<(), Batch> {
        self.inner.send(batch)
    }

    fn follows(&self, request: RequestId) -> bool {
        self.inner.follows(request)
    }

    fn overhear(&mut self, heard: Overheard) -> bool {
        self.inner.overhear(heard)
    }

    fn poll(&mut self) -> Option<Reply> {
        let reply = self.inner.poll();
        reply.iter().for_each(|reply| self.note(reply));
        reply
    }

    fn wait(&mut self) -> Option<Reply> {
        let reply = self.inner.wait();
        reply.iter().for_each(|reply| self.note(reply));
        reply
    }
}

#[cfg(test)]
mod tests {
    use pointsman_sched::sampler::Started;

    use super::*;

    /// Answers every batch with `keep`, and leaves request 9.
    #[derive(Default)]
    struct Keeping(Option<Batch>);

    impl SamplerWorker for Keeping {
        fn attend(&mut self, _now: Micros) -> Option<u64> {
            Some(3)
        }

        fn send(&mut self, batch: Batch) -> Result<(), Batch> {
            self.0 = Some(batch);
            Ok(())
        }

        fn poll(&mut self) -> Option<Reply> {
            let spent = self.0.take()?;
            let starts = spent.started.iter().map(|started| started.id);
            let ids = starts.chain(spent.tokens.iter().map(|(id, _)| *id));
            let word = |id: RequestId| (id, if id.0 == 9 { Word::Leave } else { Word::Keep });
            let words = ids.map(word).collect();
            Some(Reply {
                renewed: Vec::new(),
                words,
                spent,
                decided_by: Some(DecidedBy::native(3)),
                is_forgotten: false,
            })
        }

        fn wait(&mut self) -> Option<Reply> {
            self.poll()
        }
    }

    fn started(id: u64) -> Started {
        let (tenant, stop_tokens, attributes) = ("t".into(), Arc::from([2]), Arc::default());
        Started {
            id: RequestId(id),
            tenant,
            stop_tokens,
            prompt_tokens: 5,
            max_new_tokens: 10,
            attributes,
            said: Vec::new(),
        }
    }

    fn batch(starts: &[u64], tokens: &[(u64, u32)], ended: &[u64]) -> Batch {
        Batch {
            now: 1,
            started: starts.iter().map(|&id| started(id)).collect(),
            tokens: tokens.iter().map(|&(id, token)| (RequestId(id), token)).collect(),
            ended: ended.iter().map(|&id| RequestId(id)).collect(),
            fresh: false,
        }
    }

    #[test]
    fn a_recording_has_the_requests_that_started_in_it() {
        let tap = Arc::new(Tap::default());
        let replica = SampledReplica { name: "m:f16@cpu".into(), variant: "m:f16".into(), vocabulary: 100 };
        let mut sampler = TappedSampler::new(Keeping::default(), &tap, replica);
        let mut ask = |batch| {
            sampler.send(batch).expect("its hands are free");
            sampler.poll().expect("it answers");
        };
        ask(batch(&[1], &[], &[]));
        let mut recording = tap.start().expect("nobody records");
        ask(batch(&[], &[(1, 7)], &[]));
        ask(batch(&[2, 9], &[(1, 8)], &[]));
        ask(batch(&[], &[(1, 9), (2, 5), (9, 6)], &[1]));
        ask(batch(&[], &[], &[2]));
        ask(batch(&[], &[(2, 4)], &[]));
        let mut lines = Vec::new();
        recording.take_now(&mut lines);
        let told = |line: &Line| match line {
            Line::Sampler(line) => {
                let starts: Vec<u64> = line.started.iter().map(|started| started.id).collect();
                let words: Vec<u64> = line.words.iter().map(|(id, _)| *id).collect();
                (starts, line.tokens.clone(), words, line.ended.clone())
            }
            other => panic!("{other:?}"),
        };
        let lines: Vec<_> = lines.iter().map(told).collect();
        let none = Vec::new;
        assert_eq!(
            lines,
            [
                (vec![2, 9], Vec::new(), vec![2, 9], none()),
                (none(), vec![(2, 5)], vec![2], none()),
                (none(), Vec::new(), none(), vec![2]),
            ]
        );
    }

    #[test]
    fn a_ranking_is_recorded_with_the_names_of_its_tenants() {
        struct Keeper;
        impl RetentionPolicy for Keeper {
            fn attend(&mut self, _now: Micros) -> Attention {
                Attention::Following
            }

            fn rank(&mut self, _now: Micros, _wanted: u32, _blocks: &BlockColumns, ranking: &mut Ranking) -> bool {
                ranking.keep = vec![1];
                true
            }

            fn refused(&mut self, _now: Micros, _why: BadRanking) {}

            fn decided_by(&self) -> DecidedBy {
                DecidedBy { revision: "k@1.0.0+00000000".into(), generation: 1 }
            }
        }
        let (tap, names) = (Arc::new(Tap::default()), Arc::new(Names::default()));
        let numbers = ["a", "b"].map(|name| names.intern(NameKind::Tenant, name));
        let mut policy = TappedRetention::new(Keeper, &tap, &"m:f16@cpu".into(), &names);
        let blocks = BlockColumns { tenant: vec![numbers[1], numbers[1], 0], ..BlockColumns::default() };
        let mut recording = tap.start().expect("nobody records");
        assert!(policy.rank(5, 2, &blocks, &mut Ranking::default()));
        let mut lines = Vec::new();
        recording.take_now(&mut lines);
        let [Line::Retention(line)] = lines.as_slice() else { panic!("{lines:?}") };
        assert_eq!(line.tenants, [(0, String::new()), (numbers[1], "b".into())]);
        assert_eq!((line.answer.as_ref().map(|a| a.0.keep.clone()), line.wanted), (Some(vec![1]), 2));
        drop(recording);
        assert!(policy.rank(6, 2, &blocks, &mut Ranking::default()), "nobody listens");
    }
}
