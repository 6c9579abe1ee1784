//! Rotary positions: frequencies, how a longer context stretches them, and how `config.json` says so.
//!
//! One choice is made at load where Hugging Face makes it anew for every length: LongRoPE has factors for a short context and
//! for a long one, and a text that grows past the old context would change the keys that stand in the cache. As in vLLM, the
//! context that is served decides.

use std::f64::consts::TAU;

use serde_json::Value;

use super::read::{FieldError, Fields, invalid, missing, positive, unsupported};

/// What the fields stand in.
const FIELD: &str = "rope_scaling";
/// Positions that the model was trained on first.
const OLD_CONTEXT: &str = "original_max_position_embeddings";
const SUPPORTED: &str = "null, or rope_type = default, linear, llama3, yarn or longrope";

/// Rotate-half positions.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading elements of a head that are turned; the rest stay.
    pub width: usize,
    /// How frequencies are stretched for a longer context.
    pub scaling: RopeScaling,
    /// What sines and cosines are multiplied by.
    pub magnitude: f64,
}

/// How rotation frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Low ones divided by a factor, high ones kept, those between blended.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Turns within the old context below which a frequency counts as low.
        low: f64,
        /// ... and above which it counts as high.
        high: f64,
        /// Positions of the old context.
        old_context: f64,
    },
    /// The same, blended by the number of the frequency.
    Yarn {
        /// The factor.
        factor: f64,
        /// Up to this one they are kept.
        kept: f64,
        /// From this one on they are divided.
        divided: f64,
    },
    /// Each divided by a number of its own.
    Divided(Vec<f32>),
}

/// The parameters as a file has them.
struct Parameters<'a> {
    fields: &'a Fields,
    found: Option<&'a Value>,
}

// === impl Rope ===

impl Rope {
    /// As it is where a file says nothing.
    pub(super) fn plain(width: usize) -> Self {
        Self { theta: 10_000.0, width, scaling: RopeScaling::None, magnitude: 1.0 }
    }

    /// Reads an object with `rope_type` and its parameters. The base may stand in it or beside it.
    pub(super) fn read(fields: &Fields, found: Option<&Value>, head_dim: usize) -> Result<Self, FieldError> {
        let parameters = Parameters { fields, found };
        let theta = match parameters.get("rope_theta") {
            Some(found) => positive("rope_theta", found)?,
            None => fields.positive_or_none("rope_theta")?.unwrap_or(10_000.0),
        };
        let part = match parameters.get("partial_rotary_factor") {
            Some(found) => positive("partial_rotary_factor", found)?,
            None => fields.positive_or_none("partial_rotary_factor")?.unwrap_or(1.0),
        };
        if part > 1.0 {
            let expected = "a number above 0 and up to 1";
            return Err(invalid("partial_rotary_factor", part, expected));
        }
        let mut rope = Self { theta, ..Self::plain((head_dim as f64 * part) as usize) };
        parameters.stretch(&mut rope)?;
        Ok(rope)
    }

    /// Radians per position of each pair of elements.
    #[must_use]
    pub fn frequencies(&self) -> Vec<f64> {
        let plain = |i: usize| self.theta.powf(-2.0 * i as f64 / self.width as f64);
        (0..self.width / 2).map(|i| self.scaling.apply(i, plain(i))).collect()
    }

    /// The frequency, counted from 0, that turns so many times in so many positions.
    fn turning(&self, turns: f64, positions: f64) -> f64 {
        self.width as f64 * (positions / (turns * TAU)).ln() / (2.0 * self.theta.ln())
    }
}

impl RopeScaling {
    fn apply(&self, i: usize, frequency: f64) -> f64 {
        let blend = |kept: f64, factor: f64| frequency * (kept + (1.0 - kept) / factor);
        match *self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Divided(ref divisors) => frequency / f64::from(divisors[i]),
            Self::Llama3 { factor, low, high, old_context } => {
                let turns = old_context * frequency / TAU;
                blend(((turns - low) / (high - low)).clamp(0.0, 1.0), factor)
            }
            Self::Yarn { factor, kept, divided } => {
                blend(1.0 - ((i as f64 - kept) / (divided - kept)).clamp(0.0, 1.0), factor)
            }
        }
    }
}

// === impl Parameters ===

impl Parameters<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.found.and_then(|all| all.get(name)).filter(|value| !value.is_null())
    }

    fn or_none(&self, name: &'static str) -> Result<Option<f64>, FieldError> {
        self.get(name).map(|found| positive(name, found)).transpose()
    }

    fn number(&self, name: &'static str) -> Result<f64, FieldError> {
        self.or_none(name)?.ok_or_else(|| missing(name, "a positive number in rope_scaling"))
    }

    /// The old context: in the object, or beside it.
    fn old_context(&self) -> Result<Option<f64>, FieldError> {
        Ok(self.or_none(OLD_CONTEXT)?.or(self.fields.positive_or_none(OLD_CONTEXT)?))
    }

    fn stretch(&self, rope: &mut Rope) -> Result<(), FieldError> {
        let kind = self.get("rope_type").or_else(|| self.get("type")).map(|kind| kind.as_str().unwrap_or_default());
        match kind {
            None | Some("default") => {}
            Some("linear") => rope.scaling = RopeScaling::Linear { factor: self.number("factor")? },
            Some("llama3") => rope.scaling = self.llama3()?,
            Some("yarn") => self.yarn(rope)?,
            // `su` is what Phi-3 called it first.
            Some("longrope" | "su") => self.longrope(rope)?,
            Some(_) => return Err(unsupported(FIELD, self.found.unwrap_or(&Value::Null).to_string(), SUPPORTED)),
        }
        Ok(())
    }

    fn llama3(&self) -> Result<RopeScaling, FieldError> {
        let (low, high) = (self.number("low_freq_factor")?, self.number("high_freq_factor")?);
        if low >= high {
            return Err(invalid("low_freq_factor", low, "less than high_freq_factor"));
        }
        let old_context = self.number(OLD_CONTEXT)?;
        Ok(RopeScaling::Llama3 { factor: self.number("factor")?, low, high, old_context })
    }

    fn yarn(&self, rope: &mut Rope) -> Result<(), FieldError> {
        let context = self.fields.size("max_position_embeddings")? as f64;
        let old_context = self.old_context()?.unwrap_or(context);
        let factor = self.or_none("factor")?.unwrap_or(context / old_context);
        let (fast, slow) = (self.or_none("beta_fast")?.unwrap_or(32.0), self.or_none("beta_slow")?.unwrap_or(1.0));
        let (mut kept, mut divided) = (rope.turning(fast, old_context), rope.turning(slow, old_context));
        if self.get("truncate") != Some(&Value::Bool(false)) {
            (kept, divided) = (kept.floor(), divided.ceil());
        }
        (kept, divided) = (kept.max(0.0), divided.min(rope.width as f64 - 1.0));
        if kept >= divided {
            divided = kept + 0.001;
        }
        rope.scaling = RopeScaling::Yarn { factor, kept, divided };
        let magnitude = |weight: f64| if factor > 1.0 { 0.1 * weight * factor.ln() + 1.0 } else { 1.0 };
        rope.magnitude = match (self.or_none("attention_factor")?, self.get("mscale"), self.get("mscale_all_dim")) {
            (Some(given), ..) => given,
            (None, Some(one), Some(all)) => {
                magnitude(positive("mscale", one)?) / magnitude(positive("mscale_all_dim", all)?)
            }
            _ => magnitude(1.0),
        };
        Ok(())
    }

    fn longrope(&self, rope: &mut Rope) -> Result<(), FieldError> {
        let context = self.fields.size("max_position_embeddings")? as f64;
        let old_context = self.old_context()?.ok_or_else(|| missing(OLD_CONTEXT, "a positive number"))?;
        let name = if context > old_context { "long_factor" } else { "short_factor" };
        let numbers = |found: &Value| {
            let all = found.as_array()?.iter().map(|x| x.as_f64().map(|x| x as f32).filter(|x| *x > 0.0));
            all.collect::<Option<Vec<f32>>>().filter(|all| all.len() == rope.width / 2)
        };
        let expected = "a list of positive numbers, one for every two elements that are turned";
        let found = self.get(name).ok_or_else(|| missing(name, expected))?;
        let divisors = numbers(found).ok_or_else(|| invalid(name, found, expected))?;
        rope.scaling = RopeScaling::Divided(divisors);
        let factor = self.or_none("factor")?.unwrap_or(context / old_context);
        let natural = if factor > 1.0 { (1.0 + factor.ln() / old_context.ln()).sqrt() } else { 1.0 };
        rope.magnitude = self.or_none("attention_factor")?.unwrap_or(natural);
        Ok(())
    }
}

/// Positions to which the model is stretched: of YaRN the old context times the factor, where the file says both, since what
/// else it says may still be the old one.
pub(super) fn context(fields: &Fields, found: Option<&Value>, rope: &Rope) -> Result<usize, FieldError> {
    let said = fields.size("max_position_embeddings")?;
    let RopeScaling::Yarn { factor, .. } = rope.scaling else { return Ok(said) };
    let old_context = Parameters { fields, found }.or_none(OLD_CONTEXT)?;
    Ok(old_context.map_or(said, |old_context| said.max((old_context * factor) as usize)))
}
