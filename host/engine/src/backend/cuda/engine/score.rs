//! How likely prompt tokens were, once the step that computed them is over.
//!
//! Their logits are computed in pieces, in the places of those that choose tokens: a prompt is long, and a row of logits may be a
//! megabyte. What they are made from is what the step has left behind, so no step is begun behind one that is scored, and each piece
//! is waited for: evaluations ask for this, and not conversations.

use pointsman_sched::execute::{ExecuteError, StepOutput, StepPlan};

use super::CudaEngine;
use crate::backend::cuda::device::{DeviceError, Lane, Turn};
use crate::backend::cuda::layout::Buffer;
use crate::backend::cuda::step::{Scored, read_scores, words_with_tops, write_picks, write_score_rules};

impl CudaEngine {
    /// Adds the scores of a step that has been computed in this turn, whose outputs have been read.
    pub(super) fn score(&mut self, plan: &StepPlan, turn: Turn, out: &mut StepOutput) -> Result<(), ExecuteError> {
        let tokens: Vec<Scored> = Scored::all(plan).collect();
        for piece in tokens.chunks(self.sizes.config.max_rows) {
            self.compute_scores(piece, turn).map_err(|error| self.failed(error))?;
            read_scores(piece.len(), self.device.lane(Lane::Outputs(turn)), out)?;
        }
        Ok(())
    }

    /// Has them in the turn's outputs.
    fn compute_scores(&mut self, tokens: &[Scored], turn: Turn) -> Result<(), DeviceError> {
        let (inputs, rules, n) = (Lane::Inputs(turn), Lane::Rules(turn), tokens.len());
        let (pick, words) = write_picks(&self.sizes, tokens, self.device.lane(inputs));
        self.device.send(inputs, self.addresses[Buffer::StepInputs.index()], words)?;
        let words = write_score_rules(&self.sizes, tokens, self.device.lane(rules));
        self.device.send(rules, self.addresses[Buffer::Rules.index()], words)?;
        self.launches.clear();
        self.launches.head(&self.sizes, n, pick);
        self.launches.choose(&self.sizes, n);
        super::launch_all(&mut *self.device, &self.addresses, &self.launches)?;
        self.device.receive(Lane::Outputs(turn), self.addresses[Buffer::Outputs.index()], words_with_tops(n, n))?;
        self.device.wait()
    }
}
