//! Rows that end with drafts, as the kernels take them: each draft is a row of its own.
//!
//! In each layer the keys and values of all of a step's tokens are in the pages before anything looks at them. So a draft is a decode
//! that stands some places further on, with the same pages: the kernels of decodes compute it, in a graph where the step has nothing
//! else. The price is that each draft reads its context on its own.

use pointsman_sched::execute::{ExecuteError, Row, StepPlan};

/// Rows and drafts of a step that wait for weights as long as a single row does.
pub(super) const MOST_PLACES: u32 = 32;

/// Replaces the contents of `to` by the same step without drafts.
pub(super) fn set_apart(plan: &StepPlan, to: &mut StepPlan) {
    let StepPlan { rows, tokens, blocks, history, scores, scored, follows } = to;
    rows.clear();
    tokens.clone_from(&plan.tokens);
    blocks.clone_from(&plan.blocks);
    history.clone_from(&plan.history);
    scores.clone_from(&plan.scores);
    scored.clone_from(&plan.scored);
    follows.clone_from(&plan.follows);
    for row in &plan.rows {
        let drafts = row.tokens.end - row.drafts;
        rows.push(Row { tokens: row.tokens.start..drafts, drafts: 0, ..row.clone() });
        rows.extend((drafts..row.tokens.end).zip(1..).map(|(at, ahead)| Row {
            request: row.request,
            tokens: at..at + 1,
            position: row.position + at - row.tokens.start,
            blocks: row.blocks.clone(),
            sample: row.sample.as_ref().map(|sample| sample.ahead(ahead)),
            drafts: 0,
        }));
    }
}

/// More of them than there are rows for.
pub(super) fn check(plan: &StepPlan, max_rows: usize) -> Result<(), ExecuteError> {
    let places = plan.rows.iter().map(|row| 1 + row.drafts as usize);
    match places.sum::<usize>() <= max_rows {
        true => Ok(()),
        false => Err(ExecuteError::Malformed { what: "more rows and drafts than max_rows" }),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pointsman_sched::execute::Sample;
    use pointsman_sched::ids::{BlockId, RequestId};

    use super::*;

    #[test]
    fn a_draft_is_a_row_some_places_further_on() {
        let sample = |history| Sample {
            sampling: Arc::default(),
            index: 5,
            history,
            history_prompt: 1,
            banned: Some([4].into()),
        };
        let row = |request: u64, tokens, position, blocks, sample, drafts| Row {
            request: RequestId(request),
            tokens,
            position,
            blocks,
            sample,
            drafts,
        };
        let plan = StepPlan {
            rows: vec![
                row(1, 0..4, 30, 0..3, Some(sample(0..2)), 2),
                row(2, 4..6, 8, 3..4, None, 0),
                row(3, 6..8, 16, 4..6, Some(sample(0..0)), 1),
            ],
            tokens: (10..18).collect(),
            blocks: (20..26).map(BlockId).collect(),
            history: vec![1, 2, 12, 13],
            ..StepPlan::default()
        };
        let mut apart = StepPlan::default();
        // Whatever it had before.
        set_apart(&plan, &mut apart);
        set_apart(&plan, &mut apart);
        assert_eq!((&apart.tokens, &apart.blocks, &apart.history), (&plan.tokens, &plan.blocks, &plan.history));
        let seen = |row: &Row| {
            let sample =
                row.sample.as_ref().map(|sample| (sample.index, sample.history.clone(), sample.history_prompt));
            assert!(row.drafts == 0 && row.sample.as_ref().is_none_or(|sample| sample.banned.is_some()));
            (row.request.0, row.tokens.clone(), row.position, row.blocks.clone(), sample)
        };
        let expect = [
            (1, 0..2, 30, 0..3, Some((5, 0..2, 1))),
            (1, 2..3, 32, 0..3, Some((6, 0..3, 1))),
            (1, 3..4, 33, 0..3, Some((7, 0..4, 1))),
            (2, 4..6, 8, 3..4, None),
            (3, 6..7, 16, 4..6, Some((5, 0..0, 1))),
            (3, 7..8, 17, 4..6, Some((6, 0..0, 1))),
        ];
        assert_eq!(apart.rows.iter().map(seen).collect::<Vec<_>>(), expect);
        assert_eq!((check(&plan, 6), check(&plan, 5).is_err()), (Ok(()), true));
    }
}
