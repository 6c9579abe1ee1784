//! Which products NVIDIA's library computes: found out when a model is loaded, by computing them with it and with the kernels.
//!
//! Only products of many rows, which matrix units bound and not memory: prompts. Those of steps that are captured stay with the
//! kernels, whose grids may be larger than a step. Random numbers are multiplied, for zeros take less power than weights do, by the
//! weights of as many layers as no cache holds; all candidates take turns, for clocks rise slowly; and the device looks at its own
//! clock, behind work that keeps it busy while the host launches.

use std::fmt;

use super::cases::Rng;
use super::device::{Device, DeviceError, Gemm, GemmId, in_turn};
use super::engine::launch_all;
use super::launch::{LaunchPlan, gemm_of, input_of};
use super::layout::{Buffer, LayerPart, N_TOKENS, Sizes};

/// How often each candidate is timed.
const TRIALS: usize = 3;

/// Bytes of weights that no cache holds.
const UNCACHED_BYTES: usize = 256 << 20;

/// What the library must be below, of the kernels' time, to be taken.
const WORTH_IT: f64 = 0.97;

/// Bytes of random numbers that are copied at once.
const RANDOM_BYTES: usize = 1 << 18;

/// What a library computes, where the device has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LibraryUse {
    /// Each product that it is faster at than the kernels.
    #[default]
    Faster,
    /// Each product that it can compute: for comparisons.
    Always,
}

/// What computes a product of so many rows of a step with prompts, and what that was chosen by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GemmChoice {
    /// The product's name.
    pub product: &'static str,
    /// Rows, at least.
    pub from: usize,
    /// Rows, at most; of the longest that were measured, more as well.
    pub up_to: usize,
    /// Seconds of the product by the kernels, where that was measured.
    pub kernels: Option<f64>,
    /// The same by the library's fastest algorithm, where it has one.
    pub library: Option<f64>,
    part: LayerPart,
    /// The library's algorithm, where it is taken.
    gemm: Option<GemmId>,
}

/// What computes the products of a layer, by how many rows a step has. The kernels do until it is tuned.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct GemmChoices(Vec<GemmChoice>);

/// What measures.
pub(super) struct Tuner<'a> {
    pub(super) device: &'a mut dyn Device,
    pub(super) addresses: &'a [u64],
    pub(super) launches: &'a mut LaunchPlan,
    /// As they are while a candidate is tried.
    pub(super) sizes: Sizes,
    pub(super) how: LibraryUse,
    /// Why the first product that the library computes by no algorithm is not computed.
    pub(super) refused: Option<DeviceError>,
}

/// The product that is measured, for `up_to` rows and not fewer than `from`.
#[derive(Clone, Copy, Debug)]
struct Measured {
    part: LayerPart,
    from: usize,
    up_to: usize,
}

// === impl GemmChoices ===

impl GemmChoices {
    /// The fewest rows of a product that a library may compute.
    pub(crate) const LEAST_ROWS: usize = 65;

    /// The most rows that a library computes at once: a step with more is computed in parts.
    pub(crate) const MOST_ROWS: usize = 4_096;

    /// Row counts up to which one choice is good. Kernels have tiles of 128 rows.
    fn steps(most: usize) -> impl Iterator<Item = usize> {
        let most = most.min(Self::MOST_ROWS);
        let doubling = (7..).flat_map(|i| [1 << i, 3 << (i - 1)]);
        doubling.filter(|rows| rows % 128 == 0).take_while(move |&rows| rows < most).chain([most])
    }

    /// The library's algorithm for a product, and nothing else.
    fn of(of: Measured, gemm: GemmId) -> Self {
        Self(vec![GemmChoice::new(of, None, Some((0.0, gemm)))])
    }

    /// Every product by some algorithm.
    #[cfg(test)]
    pub(crate) fn of_all(up_to: usize) -> Self {
        let parts = [LayerPart::Qkv, LayerPart::Out, LayerPart::GateUp, LayerPart::Down];
        let of = |part| Measured { part, from: Self::LEAST_ROWS, up_to };
        Self(parts.into_iter().flat_map(|part| Self::of(of(part), GemmId(part as usize)).0).collect())
    }

    /// Everything that was chosen.
    pub(crate) fn all(&self) -> &[GemmChoice] {
        &self.0
    }

    /// The library's algorithm for a product of so many rows; `None` where a kernel computes it.
    pub(crate) fn gemm(&self, part: LayerPart, rows: usize) -> Option<GemmId> {
        if rows < Self::LEAST_ROWS {
            return None;
        }
        let rows = rows.min(Self::MOST_ROWS);
        self.0.iter().find(|choice| choice.part == part && rows <= choice.up_to)?.gemm
    }
}

// === impl GemmChoice ===

impl GemmChoice {
    /// Whether the library computes it.
    #[must_use]
    pub fn is_library(&self) -> bool {
        self.gemm.is_some()
    }

    /// What a library computes, in words; `None` where that is nothing.
    #[must_use]
    pub fn summary(choices: &[Self]) -> Option<String> {
        let mut runs: Vec<Self> = Vec::new();
        for choice in choices.iter().filter(|choice| choice.is_library()) {
            match runs.last_mut().filter(|run| run.part == choice.part && run.up_to + 1 == choice.from) {
                Some(run) => run.up_to = choice.up_to,
                None => runs.push(*choice),
            }
        }
        let words: Vec<String> = runs.iter().map(Self::rows).collect();
        (!words.is_empty()).then(|| format!("{} rows", words.join(", ")))
    }

    fn rows(&self) -> String {
        format!("{} {}-{}", self.product, self.from, self.up_to)
    }

    /// The library where the kernels were not measured, or take longer.
    fn new(of: Measured, kernels: Option<f64>, library: Option<(f64, GemmId)>) -> Self {
        let Measured { part, from, up_to } = of;
        let product = match part {
            LayerPart::Out => "out",
            LayerPart::GateUp => "gate and up",
            LayerPart::Down => "down",
            _ => "qkv",
        };
        let is_faster = |(seconds, _): &(f64, GemmId)| kernels.is_none_or(|kernels| *seconds < kernels * WORTH_IT);
        let gemm = library.filter(is_faster).map(|(_, gemm)| gemm);
        Self { product, from, up_to, kernels, library: library.map(|(seconds, _)| seconds), part, gemm }
    }
}

impl fmt::Display for GemmChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows", self.rows())?;
        match (self.kernels, self.library) {
            (Some(kernels), Some(library)) => write!(f, " {:.1} us, kernels {:.1} us", library * 1e6, kernels * 1e6),
            _ => Ok(()),
        }
    }
}

// === impl Tuner ===

impl Tuner<'_> {
    /// What shall compute the products of prompts from now on.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn tune(&mut self) -> Result<GemmChoices, DeviceError> {
        let mut choices = GemmChoices::default();
        if !self.sizes.may_use_library() {
            return Ok(choices);
        }
        let element = self.sizes.form.element;
        let numbers = element.encode(&element.random(&mut Rng(1), RANDOM_BYTES / element.bytes()));
        for part in [LayerPart::Qkv, LayerPart::Out, LayerPart::GateUp, LayerPart::Down] {
            let Some(gemm) = gemm_of(&self.sizes, part) else { continue };
            self.fill_input(part, &numbers)?;
            let mut from = GemmChoices::LEAST_ROWS;
            for up_to in GemmChoices::steps(self.sizes.config.max_step_tokens) {
                choices.0.push(self.choose(Measured { part, from, up_to }, &gemm)?);
                from = up_to + 1;
            }
        }
        Ok(choices)
    }

    /// Puts numbers where the product's input is. No step depends on what it finds there.
    fn fill_input(&mut self, part: LayerPart, numbers: &[u8]) -> Result<(), DeviceError> {
        let (buffer, width) = input_of(&self.sizes, part);
        let Sizes { form, config, .. } = &self.sizes;
        let bytes = width * config.max_step_tokens * form.element.bytes();
        let (mut at, end) = (self.addresses[buffer.index()], self.addresses[buffer.index()] + bytes as u64);
        while at < end {
            let n = (numbers.len() as u64).min(end - at);
            self.device.upload(at, &numbers[..n as usize])?;
            at += n;
        }
        Ok(())
    }

    fn choose(&mut self, of: Measured, gemm: &Gemm) -> Result<GemmChoice, DeviceError> {
        let at_once = self.sizes.rows_at_once(of.part, of.up_to);
        let asked = {
            let _nobody_records = in_turn();
            self.device.gemms(gemm, at_once, self.sizes.gemm_workspace_bytes())
        };
        let (advised, mut refused) = match asked {
            Err(error @ DeviceError::Library { .. }) => (Vec::new(), Some(error)),
            advised => (advised?, None),
        };
        let mut candidates: Vec<(GemmId, f64)> = advised.into_iter().map(|gemm| (gemm, f64::INFINITY)).collect();
        refused = self.retain(&mut candidates, Self::try_out, of)?.or(refused);
        let mut kernels = None;
        for _ in 0..TRIALS {
            if self.how == LibraryUse::Faster && !candidates.is_empty() {
                let seconds = self.time(of, GemmChoices::default())?;
                kernels = Some(kernels.map_or(seconds, |least: f64| least.min(seconds)));
            }
            refused = self
                .retain(&mut candidates, |tuner, of, gemm| tuner.time(of, GemmChoices::of(of, gemm)), of)?
                .or(refused);
        }
        if candidates.is_empty() {
            self.refused = self.refused.take().or(refused);
        }
        let fastest = candidates.into_iter().min_by(|(_, a), (_, b)| a.total_cmp(b));
        Ok(GemmChoice::new(of, kernels, fastest.map(|(gemm, seconds)| (seconds, gemm))))
    }

    /// Tries each candidate, which keeps its least seconds, and leaves out those that the library refuses; the last refusal.
    fn retain(
        &mut self,
        candidates: &mut Vec<(GemmId, f64)>,
        seconds: impl Fn(&mut Self, Measured, GemmId) -> Result<f64, DeviceError>,
        of: Measured,
    ) -> Result<Option<DeviceError>, DeviceError> {
        let mut refused = None;
        for (gemm, least) in std::mem::take(candidates) {
            match seconds(self, of, gemm) {
                Ok(seconds) => candidates.push((gemm, least.min(seconds))),
                Err(error @ DeviceError::Library { .. }) => refused = Some(error),
                Err(error) => return Err(error),
            }
        }
        Ok(refused)
    }

    /// Computes it once with the fewest rows and once with the most, for what the library advises for some it may refuse for others,
    /// and with the smallest parts of a longer step. The first use of code loads it, for which the driver may wait for everything.
    fn try_out(&mut self, of: Measured, gemm: GemmId) -> Result<f64, DeviceError> {
        let _nobody_records = in_turn();
        let in_parts = GemmChoices::MOST_ROWS + 1;
        let is_longest = of.up_to == GemmChoices::MOST_ROWS && self.sizes.config.max_step_tokens >= in_parts;
        for rows in [of.from, of.up_to].into_iter().chain(is_longest.then_some(in_parts)) {
            self.prepare((of.part, rows), 1, GemmChoices::of(of, gemm))?;
            launch_all(self.device, self.addresses, self.launches)?;
        }
        self.device.wait()?;
        Ok(f64::INFINITY)
    }

    /// Lists the product of so many rows in so many layers.
    fn prepare(
        &mut self,
        (part, rows): (LayerPart, usize),
        layers: usize,
        choices: GemmChoices,
    ) -> Result<(), DeviceError> {
        self.sizes.choices = choices;
        self.launches.clear();
        for layer in 0..layers {
            self.launches.product_of(&self.sizes, rows, (layer, part));
        }
        let count = u32::try_from(rows).unwrap_or(u32::MAX).to_le_bytes();
        self.device.upload(self.addresses[Buffer::StepInputs.index()] + N_TOKENS, &count)
    }

    /// Seconds that the product takes.
    fn time(&mut self, of: Measured, choices: GemmChoices) -> Result<f64, DeviceError> {
        let weight = gemm_of(&self.sizes, of.part).map_or(1, |gemm| gemm.k * gemm.n * gemm.element.bytes());
        let layers = UNCACHED_BYTES.div_ceil(weight.max(1)).min(self.sizes.spec.layers);
        self.prepare((of.part, of.up_to), layers, choices)?;
        launch_all(self.device, self.addresses, self.launches)?;
        self.device.start_timer()?;
        launch_all(self.device, self.addresses, self.launches)?;
        Ok(self.device.stop_timer()? / layers as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_good_up_to_its_rows() {
        let steps = |most| GemmChoices::steps(most).collect::<Vec<_>>();
        assert_eq!(steps(2_000), [128, 256, 384, 512, 768, 1_024, 1_536, 2_000]);
        assert_eq!((steps(96), steps(128), steps(9_000).last().copied()), (vec![96], vec![128], Some(4_096)));
        use LayerPart::{Down, Out, Qkv};
        // The library takes 2 s by this algorithm, or has none.
        let choice = |part, (from, up_to), gemm: Option<usize>, kernels| {
            GemmChoice::new(Measured { part, from, up_to }, kernels, gemm.map(|gemm| (2.0, GemmId(gemm))))
        };
        let choices = GemmChoices(vec![
            choice(Out, (65, 128), Some(3), Some(2.1)),
            choice(Out, (129, 256), Some(4), Some(2.01)),
            choice(Down, (65, 128), Some(5), None),
            choice(Down, (129, 4_096), Some(6), None),
            choice(Qkv, (65, 256), None, None),
        ]);
        for (part, rows, expect) in [
            (Out, 64, None),
            (Out, 65, Some(3)),
            (Out, 128, Some(3)),
            (Out, 129, None),
            (Down, 65, Some(5)),
            (Down, 4_096, Some(6)),
            (Down, 9_000, Some(6)),
            (Qkv, 100, None),
        ] {
            assert_eq!(choices.gemm(part, rows), expect.map(GemmId), "{part:?} {rows}");
        }
        let words = GemmChoice::summary(choices.all());
        assert_eq!(words.as_deref(), Some("out 65-128, down 65-4096 rows"));
        assert_eq!(GemmChoice::summary(&[choice(Out, (65, 256), None, None)]), None);
        let shown = choices.all()[0].to_string();
        assert_eq!(shown, "out 65-128 rows 2000000.0 us, kernels 2100000.0 us");
    }
}
