//! Draft tokens: what followed the same few tokens earlier in a request's own text, or what a [draft model](model) says.
//!
//! A decode step reads all weights to compute one token; it computes a few more for little. So a request may have the tokens
//! proposed that are likely to come, and the step chooses at each of them what would have been chosen there one by one: as
//! far as that is what was proposed, several tokens come at once. Nothing else changes, for a choice depends on the text before
//! it and on its number alone. Answers that repeat their prompt (edits, extraction, code) gain much, others little; so a
//! request proposes few tokens until more come true, and none for a while when hardly any does. Not a table of n-grams per
//! request: one look backwards over the text costs less than keeping a table, and nothing when nobody asks.

pub mod model;

/// Tokens that a request may have proposed in one step, at most.
pub const MAX_DRAFTS: u32 = 16;

/// The last tokens that are looked for in the text before them: this many ...
const LONGEST: usize = 4;
/// ... or fewer, but not fewer than this.
const SHORTEST: usize = 2;
/// Tokens that are looked through, the last ones.
const REACH: usize = 1 << 15;
/// Tokens that a request has proposed at first.
const FIRST: u32 = 2;
/// Proposed tokens after which it is asked whether they pay.
const WINDOW: u32 = 32;
/// They do where at least this share comes true, in percent. A place in a step is all that they cost.
pub const LEAST_PERCENT: u32 = 25;
/// Tokens that a request generates without proposals where they do not.
const PAUSE: u32 = 64;

/// How the drafts of a request are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DraftMethod {
    /// In its own text.
    #[default]
    Ngram,
    /// By the draft model of its replica; none where that has none.
    Model,
}

/// What a request has proposed for its next step, and how that went so far.
#[derive(Debug)]
pub(crate) struct Drafts {
    pub(crate) tokens: Vec<u32>,
    /// Tokens to propose next, at most.
    length: u32,
    /// In this window.
    n_proposed: u32,
    n_accepted: u32,
    /// Generated tokens up to which nothing is proposed.
    paused_until: u32,
    /// Tokens to ask the draft model for.
    pub(crate) wanted: u32,
    /// The share that must come true.
    least_percent: u32,
}

impl Default for Drafts {
    fn default() -> Self {
        Self {
            tokens: Vec::new(),
            length: FIRST,
            n_proposed: 0,
            n_accepted: 0,
            paused_until: 0,
            wanted: 0,
            least_percent: LEAST_PERCENT,
        }
    }
}

impl Drafts {
    /// Room for what a request asks for, so that no step has to make it.
    pub(crate) fn reserve(&mut self, n: u32) {
        self.tokens.reserve_exact(n.min(MAX_DRAFTS) as usize);
    }

    /// Whether proposing is not paused after `generated` tokens.
    pub(crate) fn are_worth_it(&self, generated: u32) -> bool {
        generated >= self.paused_until
    }

    /// Of `proposed` tokens, at least one, `accepted` came true; `generated` is without them.
    pub(crate) fn learn(&mut self, proposed: u32, accepted: u32, generated: u32) {
        self.length = if accepted == proposed { (2 * proposed).min(MAX_DRAFTS) } else { accepted + 1 };
        self.n_proposed += proposed;
        self.n_accepted += accepted;
        if self.n_proposed >= WINDOW {
            if self.n_accepted * 100 < self.n_proposed * self.least_percent {
                self.paused_until = generated.saturating_add(PAUSE);
            }
            (self.n_proposed, self.n_accepted) = (0, 0);
        }
    }

    /// Has a draft model asked for at most `most` tokens; how many.
    pub(crate) fn want(&mut self, most: u32) -> u32 {
        self.tokens.clear();
        self.wanted = most.min(self.length);
        self.wanted
    }

    /// Takes what a draft model has proposed.
    pub(crate) fn take(&mut self, tokens: &[u32], least_percent: u32) {
        self.tokens.extend_from_slice(tokens);
        self.least_percent = least_percent;
    }

    /// Proposes at most `most` tokens to follow `text`, none of them a stop token: what comes after one is of no use.
    pub(crate) fn propose(&mut self, text: &[u32], most: u32, stop_tokens: &[u32]) {
        self.tokens.clear();
        let most = most.min(self.length);
        if most == 0 {
            return;
        }
        let text = &text[text.len().saturating_sub(REACH)..];
        let Some(start) = continuation(text) else { return };
        for i in start..start + most as usize {
            // What repeats at once goes on with itself.
            let next = text.get(i).copied().unwrap_or_else(|| self.tokens[i - text.len()]);
            if stop_tokens.contains(&next) {
                break;
            }
            self.tokens.push(next);
        }
    }
}

/// Where the text goes on after the latest of the longest earlier occurrences of its end.
fn continuation(text: &[u32]) -> Option<usize> {
    let last = text.last()?;
    let (mut longest, mut found) = (SHORTEST - 1, None);
    for end in (1..text.len()).rev().filter(|end| text[end - 1] == *last) {
        let same = text[..end].iter().rev().zip(text.iter().rev()).take(LONGEST);
        let length = same.take_while(|(a, b)| a == b).count();
        if length > longest {
            (longest, found) = (length, Some(end));
        }
        if longest == LONGEST {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_before_is_proposed() {
        for (text, most, stop, expect) in [
            (&[][..], 4, &[][..], &[][..]),
            (&[1, 2, 3, 4, 5], 4, &[], &[]),
            (&[1, 2, 3, 9, 2], 4, &[], &[]),
            (&[1, 2, 3, 4, 1, 2], 2, &[], &[3, 4]),
            // The longest counts, then the latest.
            (&[7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], 1, &[], &[5]),
            (&[8, 1, 2, 5, 9, 1, 2, 6, 7, 1, 2], 1, &[], &[6]),
            // A repetition goes on with itself, from one token of it on.
            (&[9, 9, 9], 5, &[], &[9, 9, 9, 9, 9]),
            (&[0, 1, 2, 1, 2], 5, &[], &[1, 2, 1, 2, 1]),
            (&[1, 2, 3, 4, 1, 2], 4, &[4], &[3]),
            (&[5, 5, 5], 99, &[], &[5; MAX_DRAFTS as usize]),
            (&[5, 5, 5], 0, &[], &[]),
        ] {
            let mut drafts = Drafts { length: MAX_DRAFTS, ..Drafts::default() };
            drafts.propose(text, most, stop);
            assert_eq!(drafts.tokens, expect, "{text:?}");
        }
    }

    #[test]
    fn few_are_proposed_until_more_come_true() {
        let mut drafts = Drafts::default();
        // How many of those proposed come true at each step, and how many were proposed.
        for (accepted, proposed) in [(2, 2), (4, 4), (8, 8), (16, 16), (9, 16), (3, 10), (0, 4), (0, 1), (1, 1), (2, 2)]
        {
            drafts.propose(&[5, 5, 5], 99, &[]);
            assert_eq!(drafts.tokens, vec![5; proposed], "then {accepted} came true");
            drafts.learn(proposed as u32, accepted, 0);
        }
        // What there was no room for has not failed.
        drafts.learn(1, 1, 0);
        assert_eq!(drafts.length, 2);
    }

    #[test]
    fn only_the_last_tokens_are_looked_through() {
        let mut text: Vec<u32> = [1, 2, 3].into_iter().chain(100..100 + REACH as u32).collect();
        text.extend([1, 2]);
        assert_eq!(continuation(&text[text.len() - REACH..]), None);
        assert_eq!(continuation(&text), Some(2));
    }

    #[test]
    fn what_does_not_pay_pauses() {
        // Accepted of 4 proposed, for 8 steps; whether it goes on at 50 tokens, and when again.
        for (accepted, goes_on) in [(4, true), (1, true), (0, false)] {
            let mut drafts = Drafts::default();
            for step in 0..8 {
                assert!(drafts.are_worth_it(step), "a window is not over before {WINDOW} proposals");
                drafts.learn(4, accepted, 49);
            }
            assert_eq!((drafts.are_worth_it(50), drafts.are_worth_it(49 + PAUSE)), (goes_on, true), "{accepted} of 4");
        }
    }
}
