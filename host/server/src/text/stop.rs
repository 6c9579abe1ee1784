//! Stop strings, matched over the boundaries of tokens.
//!
//! The generation ends where the first stop string is *complete*; of several that end there, the longest counts. That
//! makes the result a function of the text alone, however it was cut into tokens. What may still become a stop string is
//! held back, so a client never sees a part of one.

use std::sync::Arc;

/// Looks for stop strings in a text that arrives in pieces.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Arc<[String]>,
    held: String,
}

/// What one piece came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matched {
    /// Text that may be shown now.
    pub text: String,
    /// The place of the stop string that is complete: the text ends before it and nothing follows.
    pub stopped: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these strings, none of them empty.
    #[must_use]
    pub fn new(stops: Arc<[String]>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: String) -> Matched {
        if self.stops.is_empty() {
            return Matched { text: piece, stopped: None };
        }
        self.held.push_str(&piece);
        if let Some((start, place)) = first_match(&self.held, &self.stops) {
            self.held.truncate(start);
            return Matched { text: std::mem::take(&mut self.held), stopped: Some(place) };
        }
        let keep_from = self.held.len() - self.partial();
        let kept = self.held.split_off(keep_from);
        Matched { text: std::mem::replace(&mut self.held, kept), stopped: None }
    }

    /// What was held back, at the end of the generation.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of the held text that begin a stop string.
    fn partial(&self) -> usize {
        let longest = |stop: &String| {
            (1..stop.len().min(self.held.len() + 1))
                .rev()
                .find(|&n| stop.is_char_boundary(n) && self.held.ends_with(&stop[..n]))
                .unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

/// Start of the match that is complete first, and whose it is; the longest of those that end together.
fn first_match(text: &str, stops: &[String]) -> Option<(usize, usize)> {
    let find =
        |(place, stop): (usize, &String)| text.find(stop.as_str()).map(|start| (start + stop.len(), start, place));
    stops.iter().enumerate().filter_map(find).min().map(|(_, start, place)| (start, place))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(pieces: &[&str], stops: &[&str]) -> (Vec<String>, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut out = Vec::new();
        for piece in pieces {
            let matched = matcher.push((*piece).to_owned());
            out.push(matched.text);
            if matched.stopped.is_some() {
                return (out, matched.stopped);
            }
        }
        out.push(matcher.finish());
        (out, None)
    }

    #[test]
    fn stop_strings_match_over_pieces() {
        for (pieces, stops, expect, stopped) in [
            (&["one", "two"][..], &[][..], &["one", "two", ""][..], None),
            (&["one\n", "\ntwo"], &["\n\n"], &["one", ""], Some(0)),
            (&["one\n", "two"], &["\n\n"], &["one", "\ntwo", ""], None),
            (&["a<", "|en", "d|>b"], &["<|end|>"], &["a", "", ""], Some(0)),
            (&["abab", "abc"], &["ababc"], &["", "ab"], Some(0)),
            (&["a<"], &["<|end|>"], &["a", "<"], None),
            (&["xabcd"], &["abcd", "c"], &["xab"], Some(1)),
            (&["xabc"], &["c", "bc"], &["xa"], Some(1)),
            (&["\u{e9}", "\u{e8}x"], &["\u{e9}\u{e8}"], &["", ""], Some(0)),
        ] {
            let (texts, did_stop) = run(pieces, stops);
            assert_eq!(
                (texts.as_slice(), did_stop),
                (&expect.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()[..], stopped),
                "{pieces:?} {stops:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            pieces in prop::collection::vec("[ab\u{e9}]{0,3}", 0..12),
            stops in prop::collection::vec("[ab\u{e9}]{1,4}", 0..4),
        ) {
            let stops: Arc<[String]> = stops.into();
            let whole: String = pieces.concat();
            let expect = first_match(&whole, &stops).map_or(&*whole, |(start, _)| &whole[..start]);
            let mut matcher = StopMatcher::new(Arc::clone(&stops));
            let mut shown = String::new();
            let mut stopped = false;
            for piece in pieces {
                let matched = matcher.push(piece);
                shown.push_str(&matched.text);
                prop_assert!(expect.starts_with(&shown));
                if matched.stopped.is_some() {
                    stopped = true;
                    break;
                }
            }
            if !stopped {
                shown.push_str(&matcher.finish());
            }
            prop_assert_eq!(shown, expect);
        }
    }
}
