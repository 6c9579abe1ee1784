//! The fields that every generation shares, with their ranges and defaults.
//!
//! What a shape calls by a name of its own, or does not have, its parser reads first and hands over as [`Own`]: an error then
//! names the field that the client sent.

use std::sync::Arc;

use pointsman_sched::ids::Priority;
use pointsman_sched::request::Sampling;
use pointsman_sched::route::RequestNumbers;
use serde_json::{Map, Value};

use super::fields::{Fields, mismatch, token_id, whole};
use super::format::Format;
use super::speculation::Speculation;
use crate::cache::{Key, KeyWriter};
use crate::config::ServerConfig;
use crate::dispatch::Target;
use crate::error::ApiError;
use crate::grammar::Compiled;
use crate::identity::{bad_priority, priority_number, priority_word};
use crate::state::ServerState;
use crate::text::TextModel;

/// Stop strings of one request (`OpenAI`'s bound).
pub(super) const MAX_STOPS: usize = 4;
/// Length of a stop string; it is searched for at every token.
const MAX_STOP_BYTES: usize = 256;
/// Extra stop tokens.
const MAX_STOP_TOKENS: usize = 64;
/// Entries of `logit_bias`.
const MAX_BIASES: usize = 1_024;

/// What a token of a prompt costs whose log-probability is told, as numbers, in the answer's lists and in its text ...
const SCORE_BYTES: u64 = 160;
/// ... and each other token that is told in its place.
const TOP_BYTES: u64 = 128;

/// Fields of chat completions and completions that would change the answer and that this host does not implement.
const UNSUPPORTED: [&str; 13] = [
    "functions",
    "audio",
    "suffix",
    "continue_final_message",
    "prompt_logprobs",
    "include_stop_str_in_output",
    "truncate_prompt_tokens",
    "chat_template",
    "documents",
    "allowed_token_ids",
    "bad_words",
    "add_special_tokens",
    "echo",
];
/// The same, of every shape.
const UNSUPPORTED_ANYWHERE: [&str; 3] = ["logits_processors", "use_beam_search", "grammar"];
/// Other servers' samplers, of every shape, and the value at which each does nothing: clients send all that they know.
const SAMPLERS: [(&str, f64); 9] = [
    ("length_penalty", 1.0),
    ("typical_p", 1.0),
    ("top_a", 0.0),
    ("tfs", 1.0),
    ("tfs_z", 1.0),
    ("top_n_sigma", -1.0),
    ("mirostat", 0.0),
    ("xtc_probability", 0.0),
    ("dry_multiplier", 0.0),
];

/// Everything but the prompt.
#[derive(Debug)]
pub(crate) struct Params {
    pub(crate) model: String,
    pub(crate) n: u32,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) min_tokens: u32,
    pub(crate) stop: Arc<[String]>,
    pub(crate) ignore_eos: bool,
    pub(crate) skip_special: bool,
    pub(crate) priority: Option<Priority>,
    pub(crate) timeout_ms: u64,
    pub(crate) cache_prompt: bool,
    pub(crate) speculation: Speculation,
    /// What groups requests when no session header does.
    pub(crate) session: Option<String>,
    /// Log-probabilities with this many alternatives.
    pub(crate) logprobs: Option<u8>,
    /// The same for the tokens of the prompt.
    pub(crate) prompt_logprobs: Option<u8>,
    /// Whether the response cache may serve it; `None` where the rest of the request says.
    pub(crate) cache_response: Option<bool>,
    /// What the text must be.
    format: Option<Format>,
    /// What stands for it once it has been taken to be compiled.
    form: Option<Key>,
    seed: Option<u64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: f32,
    frequency_penalty: f32,
    logit_bias: Option<Value>,
    stop_token_ids: Option<Value>,
}

/// What a shape has under names of its own.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) n: u32,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) stop: Arc<[String]>,
    pub(crate) session: Option<String>,
    pub(crate) logprobs: Option<u8>,
    /// A form that is asked for elsewhere than in the fields that every shape has for it.
    pub(crate) format: Option<Format>,
}

impl Own {
    /// Of chat completions and completions. `logprobs` differs between these two: the caller has read it.
    pub(super) fn openai(fields: &mut Fields, config: &ServerConfig, logprobs: Option<u8>) -> Result<Self, ApiError> {
        refuse(fields, &UNSUPPORTED)?;
        if fields.take("tools").is_some_and(|tools| tools != Value::Array(Vec::new())) {
            return Err(ApiError::unsupported("tools", "`tools` outside of chat completions"));
        }
        if !matches!(fields.integer("best_of", 1..=i64::MAX)?, None | Some(1)) {
            let what = "`best_of` above 1: ask for `n` choices and choose among them by their `logprobs`; it";
            return Err(ApiError::unsupported("best_of", what));
        }
        Ok(Self {
            n: fields.u32("n", 1..=config.max_choices)?.unwrap_or(1),
            max_tokens: max_tokens(fields)?,
            stop: stop(fields, "stop", MAX_STOPS)?,
            session: session(fields)?,
            logprobs,
            format: None,
        })
    }
}

impl Params {
    /// Reads the fields that all shapes have.
    pub(crate) fn parse(fields: &mut Fields, config: &ServerConfig, own: Own) -> Result<Self, ApiError> {
        refuse(fields, &UNSUPPORTED_ANYWHERE)?;
        refuse_samplers(fields)?;
        if fields.take("draft").is_some() {
            // Where it has a meaning it has been taken.
            let problem = "`draft` needs `accept: application/x-ndjson`, whose events say to which answer they belong";
            return Err(ApiError::invalid("draft", problem));
        }
        let Own { n, max_tokens, stop, session, logprobs, format } = own;
        let format = Format::parse(fields, format)?;
        let ignore_eos = fields.bool("ignore_eos")?.unwrap_or(false);
        if format.is_some() && ignore_eos {
            return Err(endless());
        }
        let stream = fields.bool("stream")?.unwrap_or(false);
        let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
        let max_timeout = i64::try_from(config.max_timeout_ms).unwrap_or(i64::MAX);
        let timeout_ms = fields.integer("timeout_ms", 1..=max_timeout)?.and_then(|ms| u64::try_from(ms).ok());
        Ok(Self {
            model: model(fields)?,
            n,
            include_usage: include_usage(fields, stream)?,
            stream,
            max_tokens,
            min_tokens: fields.u32("min_tokens", 0..=u32::MAX)?.unwrap_or(0),
            stop,
            ignore_eos,
            skip_special: fields.bool("skip_special_tokens")?.unwrap_or(true),
            priority: priority(fields)?,
            timeout_ms: timeout_ms.unwrap_or(config.default_timeout_ms),
            cache_prompt: fields.bool("cache_prompt")?.unwrap_or(true),
            speculation: Speculation::parse(fields, config.draft_tokens)?,
            cache_response: fields.bool("cache_response")?,
            session,
            logprobs,
            prompt_logprobs: None,
            format,
            form: None,
            #[expect(clippy::cast_sign_loss, reason = "a seed is 64 bits; its sign means nothing")]
            seed: seed.map(|seed| seed as u64),
            temperature: fields.number("temperature", 0.0..=2.0)?,
            top_p: positive(fields, "top_p", 1.0)?,
            top_k: top_k(fields)?,
            min_p: fields.number("min_p", 0.0..=1.0)?,
            repetition_penalty: fields.number("repetition_penalty", 0.01..=10.0)?,
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            logit_bias: fields.take("logit_bias"),
            stop_token_ids: fields.take("stop_token_ids"),
        })
    }

    /// The form that forced calls of tools have, which leaves no room for another.
    pub(super) fn force(&mut self, calls: Option<Format>) -> Result<(), ApiError> {
        let Some(calls) = calls else { return Ok(()) };
        if let Some(asked) = &self.format {
            return Err(asked.clashes("tool_choice"));
        }
        if self.ignore_eos {
            return Err(endless());
        }
        self.format = Some(calls);
        Ok(())
    }

    /// Compiles the form that the text must have, if one is asked for.
    pub(super) async fn grammar(
        &mut self,
        state: &ServerState,
        target: &Target,
    ) -> Result<Option<Arc<Compiled>>, ApiError> {
        match self.format.take() {
            // No tokenizer to compile it for, and an upstream has its own.
            Some(_) if target.is_elsewhere() => Ok(None),
            Some(format) => {
                self.form = Some(format.key());
                format.compile(state, target.text()).await.map(Some)
            }
            None => Ok(None),
        }
    }

    /// Writes them as chat completions have them; false where the text must have a form that has no name there.
    pub(super) fn write(&self, body: &mut Map<String, Value>) -> bool {
        let Self { max_tokens, min_tokens, stop, ignore_eos, seed, top_k, logit_bias, stop_token_ids, format, .. } =
            self;
        let fields = [
            ("max_tokens", max_tokens.map(Value::from)),
            ("min_tokens", Some(*min_tokens).filter(|n| *n > 0).map(Value::from)),
            ("stop", Some(&**stop).filter(|stop| !stop.is_empty()).map(Value::from)),
            ("ignore_eos", ignore_eos.then_some(Value::Bool(true))),
            ("seed", seed.map(Value::from)),
            ("temperature", self.temperature.map(Value::from)),
            ("top_p", self.top_p.map(Value::from)),
            ("top_k", top_k.map(Value::from)),
            ("min_p", self.min_p.map(Value::from)),
            ("repetition_penalty", self.repetition_penalty.map(Value::from)),
            ("presence_penalty", Some(self.presence_penalty).filter(|p| *p != 0.0).map(Value::from)),
            ("frequency_penalty", Some(self.frequency_penalty).filter(|p| *p != 0.0).map(Value::from)),
            ("logit_bias", logit_bias.clone()),
            ("stop_token_ids", stop_token_ids.clone()),
        ];
        body.extend(fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
        let Some(format) = format else { return true };
        let Some(format) = format.written() else { return false };
        body.insert("response_format".to_owned(), format);
        true
    }

    /// The seed that the client named.
    pub(crate) fn key_seed(&self) -> Option<u64> {
        self.seed
    }

    /// Writes what may change the answer and stands nowhere else.
    pub(crate) fn write_key(&self, key: &mut KeyWriter) {
        let Self {
            n,
            stop,
            skip_special,
            form,
            // The model's name, lengths and stop tokens, and the rules of choice are those of target, terms and sampling.
            model: _,
            max_tokens: _,
            min_tokens: _,
            ignore_eos: _,
            stop_token_ids: _,
            logprobs: _,
            prompt_logprobs: _,
            seed: _,
            temperature: _,
            top_p: _,
            top_k: _,
            min_p: _,
            repetition_penalty: _,
            presence_penalty: _,
            frequency_penalty: _,
            logit_bias: _,
            // How it is told, how soon, and from which cache.
            stream: _,
            include_usage: _,
            priority: _,
            timeout_ms: _,
            cache_prompt: _,
            speculation: _,
            cache_response: _,
            session: _,
            // Taken by now: `form` stands for it.
            format: _,
        } = self;
        key.number((*n).into());
        key.number(stop.len() as u64);
        stop.iter().for_each(|stop| key.text(stop));
        key.number((*skip_special).into());
        key.number(form.is_some().into());
        form.iter().for_each(|form| key.nested(form));
    }

    /// How tokens are chosen, with the model's defaults. Choice `i` gets the seed plus `i`.
    pub(crate) fn sampling(&self, text: &TextModel, random: u64) -> Result<Vec<Arc<Sampling>>, ApiError> {
        let defaults = text.defaults();
        let base = Sampling {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias(text.vocabulary())?,
            seed: self.seed.unwrap_or(random),
            logprobs: self.logprobs,
            prompt_logprobs: None,
        };
        // What the first choice says of the prompt holds for all.
        let scores = |i: u32| self.prompt_logprobs.filter(|_| i == 0);
        let with_seed = |i: u32| {
            let seed = base.seed.wrapping_add(i.into());
            Arc::new(Sampling { seed, prompt_logprobs: scores(i), ..base.clone() })
        };
        Ok((0..self.n).map(with_seed).collect())
    }

    /// Bytes for what is said of so many prompt tokens in each choice, until the answer is written.
    pub(crate) fn score_bytes(&self, prompt_tokens: u32) -> u64 {
        let of_token = self.prompt_logprobs.map_or(0, |top| SCORE_BYTES + TOP_BYTES * u64::from(top));
        of_token * u64::from(prompt_tokens) * u64::from(self.n)
    }

    /// What routers may ask for by name.
    pub(crate) fn numbers(&self, text: &TextModel) -> RequestNumbers {
        let temperature = self.temperature.unwrap_or(text.defaults().temperature);
        RequestNumbers {
            choices: self.n.into(),
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it was checked to be 0 to 2")]
            temperature_ppm: (f64::from(temperature) * 1e6).round() as u64,
            stream: self.stream.into(),
            min_new_tokens: self.min_tokens.into(),
            cache_prompt: self.cache_prompt.into(),
        }
    }

    /// Tokens that end the generation: the model's own, unless ignored, and those of the request.
    pub(crate) fn stop_tokens(&self, text: &TextModel) -> Result<Arc<[u32]>, ApiError> {
        let param = "stop_token_ids";
        let asked = match &self.stop_token_ids {
            None => &[][..],
            Some(Value::Array(ids)) if ids.len() <= MAX_STOP_TOKENS => ids,
            Some(other) => return Err(mismatch(param, &format!("an array of at most {MAX_STOP_TOKENS} ids"), other)),
        };
        if asked.is_empty() && !self.ignore_eos {
            return Ok(Arc::clone(text.stop_tokens()));
        }
        let own = if self.ignore_eos { &[][..] } else { text.stop_tokens() };
        let mut tokens = own.to_vec();
        for (i, id) in asked.iter().enumerate() {
            tokens.push(token_id(&format!("{param}[{i}]"), id, text.vocabulary())?);
        }
        tokens.sort_unstable();
        tokens.dedup();
        Ok(tokens.into())
    }

    fn logit_bias(&self, vocabulary: u32) -> Result<Vec<(u32, f32)>, ApiError> {
        let entries = match &self.logit_bias {
            None => return Ok(Vec::new()),
            Some(Value::Object(entries)) if entries.len() <= MAX_BIASES => entries,
            Some(other) => {
                return Err(mismatch("logit_bias", &format!("an object of at most {MAX_BIASES} entries"), other));
            }
        };
        let one = |(token, bias): (&String, &Value)| {
            let param = format!("logit_bias.{token}");
            let id: Option<u32> = token.parse().ok().filter(|id| *id < vocabulary);
            let id = id.ok_or_else(|| {
                ApiError::invalid(
                    &*param,
                    format!("`logit_bias` must map token ids below {vocabulary}, found the key \"{token}\""),
                )
            })?;
            #[expect(clippy::cast_possible_truncation, reason = "the range is checked before")]
            let bias = bias
                .as_f64()
                .filter(|b| (-100.0..=100.0).contains(b))
                .map(|b| b as f32)
                .ok_or_else(|| mismatch(&param, "a number from -100 to 100", bias))?;
            Ok((id, bias))
        };
        entries.iter().map(one).collect()
    }
}

/// Refuses fields that would change the answer and that this host does not implement: an answer that silently ignores them
/// would be wrong.
pub(crate) fn refuse(fields: &mut Fields, names: &[&str]) -> Result<(), ApiError> {
    for name in names {
        match fields.take(name) {
            None | Some(Value::Bool(false)) => {}
            Some(Value::Array(list)) if list.is_empty() => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(_) => return Err(ApiError::unsupported(*name, format!("`{name}`"))),
        }
    }
    Ok(())
}

/// Refuses other servers' samplers that are to do something.
fn refuse_samplers(fields: &mut Fields) -> Result<(), ApiError> {
    for (name, neutral) in SAMPLERS {
        let value = fields.take(name);
        if value.is_some_and(|value| value.as_f64() != Some(neutral)) {
            let what = format!("`{name}`, other than {neutral}, which does nothing,");
            return Err(ApiError::unsupported(name, what));
        }
    }
    Ok(())
}

fn endless() -> ApiError {
    let problem = "`ignore_eos` cannot be true where the text must have a form: what is complete must be able to end";
    ApiError::invalid("ignore_eos", problem)
}

pub(crate) fn model(fields: &mut Fields) -> Result<String, ApiError> {
    match fields.require("model")? {
        Value::String(name) => Ok(name),
        other => Err(mismatch("model", "a string", &other)),
    }
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.take("stream_options") else { return Ok(false) };
    if !stream {
        return Err(ApiError::invalid("stream_options", "`stream_options` needs `stream` to be true"));
    }
    Ok(Fields::of("stream_options", options)?.bool("include_usage")?.unwrap_or(false))
}

/// `max_completion_tokens` is the newer name and wins.
fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let old = fields.u32("max_tokens", 1..=u32::MAX)?;
    Ok(fields.u32("max_completion_tokens", 1..=u32::MAX)?.or(old))
}

/// Stop strings, as the field `name` has them.
pub(crate) fn stop(fields: &mut Fields, name: &str, most: usize) -> Result<Arc<[String]>, ApiError> {
    let expect = format!("a string or an array of at most {most} strings, each of 1 to {MAX_STOP_BYTES} bytes");
    let good = |text: &str| (1..=MAX_STOP_BYTES).contains(&text.len());
    let texts = match fields.take(name) {
        None => return Ok(Arc::default()),
        Some(Value::Array(texts)) if texts.len() <= most => texts,
        Some(text @ Value::String(_)) => vec![text],
        Some(other) => return Err(mismatch(name, &expect, &other)),
    };
    let read = |(i, text): (usize, Value)| match text {
        Value::String(text) if good(&text) => Ok(text),
        other => Err(mismatch(&format!("{name}[{i}]"), &expect, &other)),
    };
    texts.into_iter().enumerate().map(read).collect()
}

fn priority(fields: &mut Fields) -> Result<Option<Priority>, ApiError> {
    let Some(value) = fields.take("priority") else { return Ok(None) };
    let found = match &value {
        Value::String(word) => priority_word(word),
        other => whole(other).map(priority_number),
    };
    found.map(Some).ok_or_else(|| bad_priority("priority", &super::fields::describe(&value)))
}

pub(crate) fn session(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let user = fields.string("user")?;
    Ok(fields.string("prompt_cache_key")?.or(user).filter(|s| !s.is_empty()))
}

/// A number above 0.
fn positive(fields: &mut Fields, name: &str, max: f32) -> Result<Option<f32>, ApiError> {
    match fields.number(name, 0.0..=max)? {
        Some(0.0) => Err(ApiError::invalid(name, format!("`{name}` must be above 0"))),
        value => Ok(value),
    }
}

/// -1 and 0 keep every token.
fn top_k(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let k = fields.integer("top_k", -1..=i64::from(u32::MAX))?;
    Ok(k.map(|k| u32::try_from(k).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tests::model as text_model;

    fn parse(json: &str) -> Result<Params, ApiError> {
        let mut fields = Fields::parse(json.as_bytes())?;
        let config = ServerConfig::default();
        let own = Own::openai(&mut fields, &config, None)?;
        Params::parse(&mut fields, &config, own)
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        for (json, param, expect) in [
            (r"{}", "model", "`model` is required"),
            (r#"{"model": 3}"#, "model", "must be a string, found the number 3"),
            (r#"{"model": "m", "n": 9}"#, "n", "from 1 to 8"),
            (r#"{"model": "m", "temperature": 2.1}"#, "temperature", "from 0 to 2"),
            (r#"{"model": "m", "top_p": 0}"#, "top_p", "above 0"),
            (r#"{"model": "m", "top_k": -2}"#, "top_k", "from -1"),
            (r#"{"model": "m", "max_tokens": 0}"#, "max_tokens", "from 1"),
            (r#"{"model": "m", "stop": [""]}"#, "stop[0]", "1 to 256 bytes"),
            (r#"{"model": "m", "stop": ["a","b","c","d","e"]}"#, "stop", "found an array of 5"),
            (r#"{"model": "m", "stop": 7}"#, "stop", "found the number 7"),
            (r#"{"model": "m", "stream_options": {}}"#, "stream_options", "needs `stream`"),
            (
                r#"{"model": "m", "stream": true, "stream_options": {"include_usage": 1}}"#,
                "stream_options.include_usage",
                "a boolean",
            ),
            (r#"{"model": "m", "priority": "urgent"}"#, "priority", "found the string \"urgent\""),
            (r#"{"model": "m", "timeout_ms": 0}"#, "timeout_ms", "from 1 to"),
            (r#"{"model": "m", "tools": [{}]}"#, "tools", "not supported"),
            (
                r#"{"model": "m", "response_format": {"type": "json_object"}, "ignore_eos": true}"#,
                "ignore_eos",
                "must be able to end",
            ),
            (
                r#"{"model": "m", "speculative_config": {"method": "eagle"}}"#,
                "speculative_config.method",
                "not supported",
            ),
            (
                r#"{"model": "m", "speculative_config": {"method": "ngram", "model": "d"}}"#,
                "speculative_config.model",
                "is for the method",
            ),
            (
                r#"{"model": "m", "speculative_config": {"num_speculative_tokens": 17}}"#,
                "speculative_config.num_speculative_tokens",
                "from 0 to 16",
            ),
            (r#"{"model": "m", "bad_words": ["x"]}"#, "bad_words", "not supported"),
            (r#"{"model": "m", "add_special_tokens": true}"#, "add_special_tokens", "not supported"),
            (r#"{"model": "m", "mirostat": 2}"#, "mirostat", "other than 0"),
            (r#"{"model": "m", "typical_p": 0.5}"#, "typical_p", "other than 1"),
            (r#"{"model": "m", "best_of": 2}"#, "best_of", "ask for `n` choices"),
            (r#"{"model": "m", "seed": "x"}"#, "seed", "an integer"),
        ] {
            let error = parse(json).expect_err(json);
            assert!(error.to_string().contains(expect), "{json}: {error}");
            assert!(error.json().contains(&format!(r#""param":"{param}""#)), "{json}: {}", error.json());
        }
    }

    #[test]
    fn harmless_forms_are_accepted() {
        let params = parse(
            r#"{"model": "m", "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "frobnicate": 1,
                "max_tokens": 5, "max_completion_tokens": 7, "top_k": -1, "stop": "x", "priority": -1, "user": "u",
                "seed": -1, "metadata": {"a": "b"}, "n": 2, "bad_words": [], "grammar": "", "mirostat": 0, "typical_p": 1.0,
                "echo": false}"#,
        )
        .expect("all of these are fine");
        assert_eq!((params.max_tokens, params.top_k, params.priority), (Some(7), Some(0), Some(Priority::High)));
        assert_eq!((&*params.stop, params.session.as_deref()), (&["x".to_owned()][..], Some("u")));
        let sampling = params.sampling(&text_model(), 9).expect("good");
        assert_eq!(sampling.iter().map(|s| s.seed).collect::<Vec<_>>(), [u64::MAX, 0]);
        assert_eq!(sampling[0].temperature, 1.0);
    }

    #[test]
    fn token_ids_are_checked_against_the_vocabulary() {
        let text = text_model();
        for (json, expect) in [
            (r#"{"model": "m", "logit_bias": {"999": 1}}"#, "found the key \\\"999\\\""),
            (r#"{"model": "m", "logit_bias": {"5": 101}}"#, "`logit_bias.5` must be a number from -100 to 100"),
            (r#"{"model": "m", "stop_token_ids": [1, 999]}"#, "`stop_token_ids[1]` must be a token id below 264"),
            (r#"{"model": "m", "stop_token_ids": 7}"#, "`stop_token_ids` must be an array"),
        ] {
            let params = parse(json).expect("the shape is fine");
            let error =
                params.sampling(&text, 0).map(|_| ()).and(params.stop_tokens(&text).map(|_| ())).expect_err(json);
            assert!(error.json().contains(expect), "{}", error.json());
        }
        let params = parse(r#"{"model": "m", "ignore_eos": true, "stop_token_ids": [7, 5, 7]}"#).expect("good");
        assert_eq!(*params.stop_tokens(&text).expect("good"), [5, 7]);
    }
}
