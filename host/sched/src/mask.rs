//! The seam to grammars: which tokens may go on with a text that must keep a form.
//!
//! A sampler policy speaks for a whole replica and may be silent; a mask belongs to one request, and no token of that request
//! is chosen without it. So it is an object that the request brings along and that the desk
//! ([`crate::sampler::Desk`]) keeps beside the policy's words: told of every token, asked before the next one. The work is
//! done elsewhere while the device computes; a mask that is late costs its own request a step, and the others a millisecond of
//! it at most.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use crate::sampler::Edit;

/// Limits what one request may say.
pub trait TokenMask: Send + Debug {
    /// Begins to work out what may come first (`None`), or after `token`, and wakes the thread that calls (`unpark`) when it is
    /// there. Never blocks. The mask before has been given by then.
    fn advance(&mut self, token: Option<u32>);

    /// What may come next, an [`Edit::Only`] that is not empty; waits for it up to `patience`, and is `None` until it is there.
    ///
    /// # Errors
    /// There is none and will be none: the request must end.
    fn mask(&mut self, patience: Duration) -> Option<Result<Arc<Edit>, MaskError>>;
}

/// Why a request that must keep a form cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MaskError {
    /// The grammar asks for more work per token than is allowed; the client's to change.
    #[error("the requested format is too complex here ({why}): simplify the schema or grammar")]
    Grammar {
        /// In the words of the grammar engine.
        why: Arc<str>,
    },
    /// All masks together would use more memory than they may; passes with time.
    #[error("the formats of all requests in flight use the memory that this host gives them: retry later")]
    NoMemory,
    /// What the grammar allows and what the sampler policy allows have nothing in common.
    #[error("the sampler policy of this host allows no token with which the requested format can go on")]
    Disjoint,
}

/// A set of token ids, a bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSet {
    words: Box<[u32]>,
}

impl TokenSet {
    /// The set whose bits are those of `words`: token `t` is bit `t % 32` of word `t / 32`.
    #[must_use]
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words: words.into() }
    }

    /// Its bits; tokens beyond the last word are not in it.
    #[must_use]
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether a token is in it.
    #[must_use]
    pub fn contains(&self, token: u32) -> bool {
        self.words.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// Its tokens, ascending.
    pub fn tokens(&self) -> impl Iterator<Item = u32> {
        let bits = |(i, word): (u32, &u32)| {
            let word = *word;
            (0..32).filter(move |bit| word >> bit & 1 == 1).map(move |bit| i * 32 + bit)
        };
        (0..).zip(&self.words).flat_map(bits)
    }

    /// What of it a policy's edit leaves; `None` for nothing. A bias leaves all of it.
    fn under(&self, policy: &Edit) -> Option<Self> {
        let words: Vec<u32> = match policy {
            Edit::Bias(_) => return Some(self.clone()),
            Edit::Only(other) => self.words.iter().zip(other.words()).map(|(a, b)| a & b).collect(),
            Edit::Allow(tokens) => {
                let mut words = vec![0; self.words.len()];
                for &token in tokens.iter().filter(|&&token| self.contains(token)) {
                    words[token as usize / 32] |= 1 << (token % 32);
                }
                words
            }
            Edit::Forbid(tokens) => {
                let mut words = self.words.to_vec();
                for &token in tokens {
                    if let Some(word) = words.get_mut(token as usize / 32) {
                        *word &= !(1 << (token % 32));
                    }
                }
                words
            }
        };
        words.iter().any(|word| *word != 0).then(|| Self::from_words(words))
    }
}

/// A request's mask and a policy's edit as one. A bias is set aside while there is a mask: a device applies one or the other.
pub(crate) fn combine(mask: Arc<Edit>, policy: Option<&Edit>) -> Result<Arc<Edit>, MaskError> {
    match (&*mask, policy) {
        (_, None | Some(Edit::Bias(_))) => Ok(mask),
        (Edit::Only(set), Some(policy)) => {
            set.under(policy).map(|set| Arc::new(Edit::Only(set))).ok_or(MaskError::Disjoint)
        }
        (Edit::Allow(_) | Edit::Forbid(_) | Edit::Bias(_), Some(_)) => Ok(mask),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(tokens: &[u32]) -> TokenSet {
        let mut words = vec![0; 3];
        tokens.iter().for_each(|token| words[*token as usize / 32] |= 1 << (token % 32));
        TokenSet::from_words(words)
    }

    #[test]
    fn a_mask_and_a_policy_are_combined() {
        let vocabulary = 200;
        let mask = || Arc::new(Edit::Only(set(&[3, 40, 90])));
        let only = |tokens: &[u32]| Ok(Arc::new(Edit::Only(set(tokens))));
        let allow = |tokens: &[u32]| Edit::allow(tokens.to_vec(), vocabulary).expect("good");
        let forbid = |tokens: &[u32]| Edit::forbid(tokens.to_vec(), vocabulary).expect("good");
        for (policy, expect) in [
            (None, only(&[3, 40, 90])),
            (Some(allow(&[3, 4, 150])), only(&[3])),
            (Some(allow(&[4, 150])), Err(MaskError::Disjoint)),
            (Some(forbid(&[40, 41, 150])), only(&[3, 90])),
            (Some(forbid(&[3, 40, 90])), Err(MaskError::Disjoint)),
            (Some(Edit::bias(vec![(4, 9.0)], vocabulary).expect("good")), only(&[3, 40, 90])),
        ] {
            assert_eq!(combine(mask(), policy.as_ref()), expect, "{policy:?}");
        }
    }

    #[test]
    fn a_set_ends_with_its_words() {
        let set = set(&[0, 31, 32, 95]);
        let found: Vec<u32> = (0..200).filter(|&token| set.contains(token)).collect();
        assert_eq!(found, [0, 31, 32, 95]);
        assert_eq!(set.tokens().collect::<Vec<_>>(), found);
    }
}
