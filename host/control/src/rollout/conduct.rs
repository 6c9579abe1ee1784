//! A rollout under way: which arm serves now, which period is open, and what the host has to do about it.
//!
//! The host calls [`Rollout::note`] with every event and [`Rollout::tick`] a few times a second; whatever comes back is to be
//! carried out in order. What dies with the process (open periods, who serves) is here, what survives is the document.

use pointsman_telemetry::{Event, Micros};

use super::assign::{Arm, blocks};
use super::document::{Cause, Decision, Phase, RolloutDocument};
use super::ledger::{Ledger, Period, Seen, Split};
use super::shadow::Answers;

/// What the host has to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Let this arm serve from now on, and say so with [`Rollout::served`].
    Serve(Arm),
    /// Journal a period that has been taken in, and store the document.
    Observed(Box<Period>),
    /// Carry a decision out, journal it and store the document.
    Decided(Decision),
}

/// A rollout under way.
#[derive(Debug)]
pub struct Rollout {
    document: RolloutDocument,
    ledger: Ledger,
    split: Split,
    /// Who serves, as the host was told.
    serving: Arm,
    current: Option<Current>,
    ticked: Micros,
    /// How a shadow has answered since it was staged.
    answers: Answers,
}

/// The period whose blocks are being served.
#[derive(Debug)]
struct Current {
    percent: u8,
    arms: Vec<Arm>,
    start: Micros,
    end: Micros,
}

// === impl Rollout ===

impl Rollout {
    /// Takes a new or a stored document up; control serves.
    #[must_use]
    pub fn new(document: RolloutDocument, split: Split) -> Self {
        let ledger = Ledger::new(&document.spec, split);
        Self { document, ledger, split, serving: Arm::Control, current: None, ticked: 0, answers: Answers::default() }
    }

    /// What is known of it.
    #[must_use]
    pub fn document(&self) -> &RolloutDocument {
        &self.document
    }

    /// Who serves, as the host was told last.
    #[must_use]
    pub fn serving(&self) -> Arm {
        self.serving
    }

    /// Percent of the units that are the candidate's now, where units are split. A step begins with its first period, so that
    /// every request of a period had the same chance.
    #[must_use]
    pub fn share(&self) -> u8 {
        self.current.as_ref().map_or(0, |current| current.percent)
    }

    /// Takes an event; tells of each request of an arm what happened to it.
    pub fn note(&mut self, event: &Event, tell: &mut dyn FnMut(Seen)) {
        self.ledger.note(event, tell);
    }

    /// The host has carried out [`Command::Serve`].
    pub fn served(&mut self, now: Micros) {
        self.ledger.switched(now);
    }

    /// Events were lost: the periods under way prove nothing.
    pub fn lost_events(&mut self) {
        self.ledger.spoil();
    }

    /// How a shadow has answered since it was staged, all in all. To be called before each [`tick`](Self::tick): what is new
    /// came in the period that is open until then.
    pub fn answered(&mut self, answers: Answers) {
        self.ledger.answered(&answers.since(&self.answers));
        self.answers = answers;
    }

    /// What is to be done now. Call it often: a switch is as late as this.
    pub fn tick(&mut self, now: Micros) -> Vec<Command> {
        let mut commands = Vec::new();
        if now.saturating_sub(self.ticked) > self.block_us() / 2 {
            // Nobody was there to switch: what is under way is not what the plan says.
            self.ledger.spoil();
        }
        self.ticked = now;
        while let Some(period) = self.ledger.settled(now) {
            let decisions = self.document.observe(&period);
            commands.push(Command::Observed(Box::new(period)));
            commands.extend(decisions.into_iter().map(Command::Decided));
            if self.document.phase != Phase::Running {
                break;
            }
        }
        commands.extend(self.serve(now));
        commands
    }

    /// An operator, or the host itself, decides.
    pub fn decide(&mut self, decision: Decision, now: Micros) -> Vec<Command> {
        self.document.apply(&decision);
        let mut commands = vec![Command::Decided(decision)];
        commands.extend(self.serve(now));
        commands
    }

    /// The candidate misbehaved so that nothing else counts: it is off now.
    pub fn hard_fault(&mut self, what: String, now: Micros) -> Vec<Command> {
        self.decide(Decision::Abort { cause: Cause::Hard { what } }, now)
    }

    fn block_us(&self) -> Micros {
        self.document.spec.block_ms.saturating_mul(1_000).max(1)
    }

    fn serve(&mut self, now: Micros) -> Option<Command> {
        let arm = match self.document.phase {
            Phase::Running => self.arm_at(now),
            Phase::Promoted => Arm::Candidate,
            Phase::Paused { .. } | Phase::Aborted { .. } | Phase::Completed => {
                self.ledger.clear();
                self.current = None;
                Arm::Control
            }
        };
        if arm == self.serving {
            return None;
        }
        self.serving = arm;
        // The host ends a rollout with a command of its own; until then its slot knows two arms.
        (!self.document.phase.is_over() && matches!(self.split, Split::Time { .. })).then_some(Command::Serve(arm))
    }

    /// The arm of the block that `now` is in; opens the next period where the last one has ended.
    fn arm_at(&mut self, now: Micros) -> Arm {
        let block_us = self.block_us();
        let ended = self.current.as_ref().is_none_or(|current| current.end <= now);
        if ended {
            // Periods follow each other without a gap, unless the host was away for longer than a block.
            let before = self.current.take().filter(|c| now - c.end < block_us);
            let start = before.map_or(now, |c| c.end);
            let (number, percent) = (self.document.progress.next_period, self.document.percent());
            self.document.progress.next_period += 1;
            let arms = match self.split {
                Split::Time { .. } => blocks(self.document.spec.seed, number, percent),
                Split::Variant(_) => vec![Arm::Control, Arm::Candidate],
            };
            let end = self.ledger.begin((number, percent), start, &arms, self.serving);
            self.current = Some(Current { percent, arms, start, end });
        }
        let Some(current) = &self.current else { return Arm::Control };
        let block = usize::try_from((now - current.start) / block_us).unwrap_or(usize::MAX);
        match self.split {
            Split::Time { .. } => current.arms.get(block).copied().unwrap_or(Arm::Control),
            // Both serve, side by side.
            Split::Variant(_) => self.serving,
        }
    }
}
