//! Embeddings that upstreams make: which is asked, who follows one that fails, and what an answer must be.
//!
//! No router is asked: there is no queue and no prefix to choose by, so the least busy takes it. The body is the client's own,
//! its vectors are read and written again: so a client gets the form that it asked for, and never half an answer.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use pointsman_telemetry::UpstreamOutcome;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::generate::tokenizing;
use crate::error::ApiError;
use crate::ports::{Elsewhere, Encoder};
use crate::upstream::{Blame, Mishap, Onward, Seat};

/// What an answer must be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) n_inputs: usize,
    /// Numbers of a vector, at least: servers that do not know the field send all that they have.
    pub(super) dimensions: Option<u32>,
}

/// What an upstream has made of a request.
#[derive(Debug)]
pub(super) struct Made<'a> {
    /// Who it was.
    pub(super) by: &'a Elsewhere,
    /// One for each input.
    pub(super) vectors: Vec<Vec<f32>>,
    /// As it counts them, where it does.
    pub(super) tokens: Option<u32>,
}

#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow)]
    data: Vec<Item<'a>>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Item<'a> {
    index: Option<usize>,
    /// Numbers, or a text that holds them.
    #[serde(borrow)]
    embedding: &'a RawValue,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: Option<u32>,
}

/// Asks one upstream after the other, the least busy first, until one has answered.
pub(super) async fn ask<'a>(
    encoder: &'a Encoder,
    (onward, tag): (&Onward, &str),
    (wanted, tokens): (Wanted, u32),
) -> Result<Made<'a>, ApiError> {
    let mut left: Vec<&Elsewhere> = encoder.upstreams.iter().collect();
    let mut failed: Option<(&Elsewhere, Mishap)> = None;
    loop {
        let Some((by, mut seat)) = enter(&mut left, tokens) else { return Err(unserved(encoder, failed)) };
        if let Some((before, _)) = &failed {
            before.upstream.retried();
        }
        let mishap = match fetch(&mut seat, (onward, tag), wanted).await? {
            Ok((vectors, tokens)) => return Ok(Made { by, vectors, tokens }),
            Err(mishap) => mishap,
        };
        tracing::info!(
            request = tag,
            upstream = &**by.upstream.name(),
            mishap = mishap.logged(),
            "an upstream failed a request"
        );
        let is_clients = mishap.blame() == Blame::Client;
        failed = Some((by, mishap));
        if is_clients {
            return Err(unserved(encoder, failed));
        }
    }
}

/// A place at the least busy of them that has one; it and those that have none are asked no more.
fn enter<'a>(left: &mut Vec<&'a Elsewhere>, tokens: u32) -> Option<(&'a Elsewhere, Seat)> {
    loop {
        let next = (0..left.len()).min_by_key(|i| left[*i].upstream.busy_ppm())?;
        let next = left.remove(next);
        if let Some(seat) = next.upstream.enter(tokens) {
            return Some((next, seat));
        }
    }
}

fn unserved(encoder: &Encoder, failed: Option<(&Elsewhere, Mishap)>) -> ApiError {
    match failed {
        Some((by, mishap)) => ApiError::Upstream { upstream: by.upstream.name().clone(), mishap },
        None if encoder.upstreams.iter().any(|elsewhere| elsewhere.upstream.is_up()) => {
            ApiError::Saturated { what: format!("the upstreams of `{}` have no place free", encoder.name) }
        }
        None => ApiError::NoReplica { model: encoder.name.to_string() },
    }
}

/// The vectors, and the tokens that they were of.
type Vectors = (Vec<Vec<f32>>, Option<u32>);

async fn fetch(
    seat: &mut Seat,
    (onward, tag): (&Onward, &str),
    wanted: Wanted,
) -> Result<Result<Vectors, Mishap>, ApiError> {
    let read = match seat.fetch(onward, tag).await {
        Ok(body) => tokenizing(body.len(), move || Ok(read(&body, wanted))).await?,
        Err(mishap) => Err(mishap),
    };
    seat.ended(read.as_ref().map_or_else(Mishap::outcome, |_| UpstreamOutcome::Answered));
    Ok(read)
}

/// Reads an answer: a vector for each input, all of one length.
fn read(body: &Bytes, Wanted { n_inputs, dimensions }: Wanted) -> Result<Vectors, Mishap> {
    let garbled = |what: &str| Mishap::Garbled(what.to_owned());
    let Answer { data, usage } = serde_json::from_slice(body).map_err(|_| garbled("no list of embeddings"))?;
    if data.len() != n_inputs {
        return Err(Mishap::Garbled(format!("{} embeddings for {n_inputs} inputs", data.len())));
    }
    let mut vectors = vec![Vec::new(); n_inputs];
    for (place, Item { index, embedding }) in data.into_iter().enumerate() {
        let vector = numbers(embedding.get()).ok_or_else(|| garbled("an embedding that is no numbers"))?;
        match vectors.get_mut(index.unwrap_or(place)).filter(|free| free.is_empty()) {
            Some(free) => *free = vector,
            None => return Err(garbled("two embeddings for one input")),
        }
    }
    if vectors.iter().any(|vector| vector.is_empty() || vector.len() != vectors[0].len()) {
        return Err(garbled("embeddings of different lengths"));
    }
    if let Some(least) = dimensions.filter(|least| vectors.iter().any(|vector| vector.len() < *least as usize)) {
        return Err(Mishap::Garbled(format!("embeddings of fewer than {least} numbers")));
    }
    Ok((vectors, usage.and_then(|usage| usage.prompt_tokens)))
}

/// Numbers, or little-endian `f32`s in base64.
fn numbers(json: &str) -> Option<Vec<f32>> {
    let vector: Vec<f32> = match serde_json::from_str::<String>(json) {
        Err(_) => serde_json::from_str(json).ok()?,
        Ok(text) => {
            let bytes = BASE64_STANDARD.decode(text).ok()?;
            let (numbers, rest) = bytes.as_chunks();
            rest.is_empty().then(|| numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())?
        }
    };
    vector.iter().all(|x| x.is_finite()).then_some(vector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_in_both_forms_and_in_any_order() {
        let wanted = |dimensions| Wanted { n_inputs: 2, dimensions };
        let read_as = |text: &str, dimensions| read(&Bytes::copy_from_slice(text.as_bytes()), wanted(dimensions));
        let read = |text: &str| read_as(text, Some(1));
        let expect = Ok((vec![vec![1.0, -0.5], vec![0.25, 3.0]], Some(7)));
        for data in [
            r#"[{"embedding": [1, -0.5]}, {"embedding": [0.25, 3]}]"#,
            r#"[{"index": 1, "embedding": [0.25, 3.0]}, {"index": 0, "embedding": [1.0, -5e-1]}]"#,
            r#"[{"index": 0, "embedding": "AACAPwAAAL8="}, {"index": 1, "embedding": "AACAPgAAQEA="}]"#,
        ] {
            assert_eq!(read(&format!(r#"{{"data": {data}, "usage": {{"prompt_tokens": 7}}}}"#)), expect, "{data}");
        }
        let short = read_as(r#"{"data": [{"embedding": [1, 2]}, {"embedding": [3, 4]}]}"#, Some(3));
        assert!(matches!(&short, Err(Mishap::Garbled(said)) if said.contains("fewer than 3 numbers")), "{short:?}");
        for (body, says) in [
            ("<html>", "no list of embeddings"),
            (r#"{"data": []}"#, "0 embeddings for 2 inputs"),
            (r#"{"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]}"#, "two embeddings for one"),
            (r#"{"data": [{"index": 2, "embedding": [1]}, {"index": 0, "embedding": [1]}]}"#, "two embeddings for one"),
            (r#"{"data": [{"embedding": [1]}, {"embedding": [1, 2]}]}"#, "of different lengths"),
            (r#"{"data": [{"embedding": []}, {"embedding": []}]}"#, "of different lengths"),
            (r#"{"data": [{"embedding": [1e60]}, {"embedding": [1]}]}"#, "no numbers"),
            (r#"{"data": [{"embedding": "AACAPwA="}, {"embedding": [1]}]}"#, "no numbers"),
            (r#"{"data": [{"embedding": null}, {"embedding": [1]}]}"#, "no numbers"),
        ] {
            let found = read(body).expect_err(body);
            assert!(matches!(&found, Mishap::Garbled(said) if said.contains(says)), "{body}: {found:?}");
        }
    }
}
