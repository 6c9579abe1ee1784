//! What requests look like: lengths by a seeded distribution, prompts of common words.
//!
//! Words and not token ids: every server takes text. A common word is about one token with most tokenizers; the report
//! prints what the server counted.

use std::str::FromStr;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, LogNormal};
use serde_json::json;

use crate::cli::BenchArgs;

/// Longest prompt and answer that can be asked for, in tokens.
const MAX_TOKENS: u32 = 1 << 20;

/// Lengths of prompts and answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Evenly from these ranges, in tokens, both ends included.
    Uniform { input: (u32, u32), output: (u32, u32) },
    /// Long-tailed, as people's conversations are: log-normal, medians 110 and 130 tokens, means about 225 and 195, cut at
    /// 4 and 1,024.
    Chat,
}

/// A length in words.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no shape: use IN:OUT in tokens, as in 128:64 or 100-200:16-64 (1 to {MAX_TOKENS}), or `chat`")]
pub(crate) struct BadShape(String);

/// One request's lengths, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    input: u32,
    output: u32,
}

impl FromStr for Shape {
    type Err = BadShape;

    fn from_str(text: &str) -> Result<Self, BadShape> {
        if text == "chat" {
            return Ok(Self::Chat);
        }
        let range = |text: &str| {
            let (low, high) = text.split_once('-').unwrap_or((text, text));
            let (low, high) = (low.parse().ok()?, high.parse().ok()?);
            (1..=high).contains(&low).then_some((low, high)).filter(|_| high <= MAX_TOKENS)
        };
        let shape = text
            .split_once(':')
            .and_then(|(input, output)| Some(Self::Uniform { input: range(input)?, output: range(output)? }));
        shape.ok_or_else(|| BadShape(text.to_owned()))
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let range = |(low, high): (u32, u32)| if low == high { low.to_string() } else { format!("{low}-{high}") };
        match *self {
            Self::Uniform { input, output } => write!(f, "{}:{}", range(input), range(output)),
            Self::Chat => f.write_str("chat"),
        }
    }
}

impl Shape {
    fn sizes(self, random: &mut SmallRng) -> Sizes {
        match self {
            Self::Uniform { input, output } => Sizes {
                input: random.random_range(input.0..=input.1),
                output: random.random_range(output.0..=output.1),
            },
            Self::Chat => {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "4 to 1,024")]
                let mut draw = |median: f64, sigma: f64| {
                    let tail = LogNormal::new(median.ln(), sigma).map_or(median, |tail| tail.sample(random));
                    tail.round().clamp(4.0, 1_024.0) as u32
                };
                Sizes { input: draw(110.0, 1.2), output: draw(130.0, 0.9) }
            }
        }
    }
}

/// The body of request `index`: a function of the arguments and the index alone.
pub(super) fn body(args: &BenchArgs, model: &str, index: u64) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(args.seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let Sizes { input, output } = args.shape.sizes(&mut random);
    let mut prompt = words(&mut SmallRng::seed_from_u64(args.seed), args.prefix_tokens);
    prompt.push_str(&words(&mut random, input));
    let mut body = json!({
        "model": model, "max_tokens": output, "temperature": 0, "ignore_eos": true, "stream": !args.no_stream,
    });
    if !args.no_stream {
        body["stream_options"] = json!({ "include_usage": true });
    }
    match args.chat {
        true => body["messages"] = json!([{ "role": "user", "content": prompt }]),
        false => body["prompt"] = prompt.into(),
    }
    body.to_string().into_bytes()
}

fn words(random: &mut SmallRng, n: u32) -> String {
    let word = |_| WORDS.choose(random).copied().unwrap_or(WORDS[0]);
    (0..n).map(word).collect()
}

const WORDS: [&str; 48] = [
    " the", " of", " and", " to", " in", " is", " that", " for", " it", " as", " was", " with", " be", " by", " on",
    " not", " he", " are", " or", " his", " from", " at", " which", " but", " have", " an", " had", " they", " you",
    " were", " their", " one", " all", " we", " can", " her", " has", " there", " been", " if", " more", " when",
    " will", " would", " who", " so", " no", " out",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_read_and_written() {
        for text in ["128:64", "1:1", "100-200:16-64", "7:1-1048576", "chat"] {
            assert_eq!(text.parse::<Shape>().expect(text).to_string(), text);
        }
        for text in ["", "128", "0:1", "1:0", "9-3:4", "a:b", "1:1048577", "1:-4", "chat:3"] {
            let error = text.parse::<Shape>().expect_err(text).to_string();
            assert!(error.contains("use IN:OUT"), "{error}");
        }
    }

    #[test]
    fn conversations_have_a_long_tail() {
        let mut random = SmallRng::seed_from_u64(1);
        let mut sizes: Vec<Sizes> = (0..20_001).map(|_| Shape::Chat.sizes(&mut random)).collect();
        let mean = |get: fn(&Sizes) -> u32| sizes.iter().map(|s| f64::from(get(s))).sum::<f64>() / sizes.len() as f64;
        let (input, output) = (mean(|s| s.input), mean(|s| s.output));
        assert!((190.0..230.0).contains(&input) && (175.0..200.0).contains(&output), "{input} {output}");
        sizes.sort_by_key(|s| s.input);
        assert!((104..=116).contains(&sizes[10_000].input), "{:?}", sizes[10_000]);
        assert_eq!((sizes[0].input, sizes[20_000].input), (4, 1_024));
    }
}
