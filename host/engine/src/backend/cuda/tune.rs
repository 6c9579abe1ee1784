//! Which products NVIDIA's library computes: found out when a model is loaded, by computing them with it and with the kernels.
//!
//! Only products of many rows, which matrix units bound and not memory: prompts. Those of steps that are captured stay with the
//! kernels, whose grids may be larger than a step. Random numbers are multiplied, for zeros take less power than weights do, by the
//! weights of as many layers as no cache holds; all candidates take turns, for clocks rise slowly; and the device looks at its own
//! clock, behind work that keeps it busy while the host launches.

use std::fmt;

use super::cases::Rng;
use super::device::{Device, DeviceError, Gemm, GemmId};
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

/// What computes a product of up to so many rows of a step with prompts, and what that was chosen by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GemmChoice {
    /// The product's name.
    pub product: &'static str,
    /// Rows, at most.
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
    /// The first product that the library refused.
    pub(super) refused: Option<DeviceError>,
}

/// The product that is measured, for `up_to` rows and not fewer than `from`.
#[derive(Clone, Copy)]
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
    fn of(part: LayerPart, up_to: usize, gemm: GemmId) -> Self {
        Self(vec![GemmChoice::new(part, up_to, None, Some((0.0, gemm)))])
    }

    /// Every product by some algorithm.
    #[cfg(test)]
    pub(crate) fn of_all(up_to: usize) -> Self {
        let parts = [LayerPart::Qkv, LayerPart::Out, LayerPart::GateUp, LayerPart::Down];
        Self(parts.into_iter().flat_map(|part| Self::of(part, up_to, GemmId(part as usize)).0).collect())
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
        let by_library = choices.iter().filter(|choice| choice.is_library());
        let words: Vec<String> = by_library.map(|choice| format!("{} to {}", choice.product, choice.up_to)).collect();
        (!words.is_empty()).then(|| format!("{} rows", words.join(", ")))
    }

    /// The library where the kernels were not measured, or take longer.
    fn new(part: LayerPart, up_to: usize, kernels: Option<f64>, library: Option<(f64, GemmId)>) -> Self {
        let product = match part {
            LayerPart::Out => "out",
            LayerPart::GateUp => "gate and up",
            LayerPart::Down => "down",
            _ => "qkv",
        };
        let is_faster = |(seconds, _): &(f64, GemmId)| kernels.is_none_or(|kernels| *seconds < kernels * WORTH_IT);
        let gemm = library.filter(is_faster).map(|(_, gemm)| gemm);
        Self { product, up_to, kernels, library: library.map(|(seconds, _)| seconds), part, gemm }
    }
}

impl fmt::Display for GemmChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {} rows", self.product, self.up_to)?;
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
        let Measured { part, up_to, .. } = of;
        let at_once = self.sizes.rows_at_once(part, up_to);
        let advised = self.device.gemms(gemm, at_once, self.sizes.gemm_workspace_bytes());
        let mut candidates: Vec<(GemmId, f64)> = Vec::new();
        for gemm in self.unless_refused(advised)?.unwrap_or_default() {
            let tried = self.try_out(of, gemm);
            if self.unless_refused(tried)?.is_some() {
                candidates.push((gemm, f64::INFINITY));
            }
        }
        let mut kernels = None;
        for _ in 0..TRIALS {
            if self.how == LibraryUse::Faster && !candidates.is_empty() {
                let seconds = self.time(of, GemmChoices::default())?;
                kernels = Some(kernels.map_or(seconds, |least: f64| least.min(seconds)));
            }
            for (gemm, least) in &mut candidates {
                *least = least.min(self.time(of, GemmChoices::of(part, up_to, *gemm))?);
            }
        }
        let fastest = candidates.into_iter().min_by(|(_, a), (_, b)| a.total_cmp(b));
        Ok(GemmChoice::new(part, up_to, kernels, fastest.map(|(gemm, seconds)| (seconds, gemm))))
    }

    /// Nothing where the library refused, which is kept.
    fn unless_refused<T>(&mut self, result: Result<T, DeviceError>) -> Result<Option<T>, DeviceError> {
        match result {
            Err(error @ DeviceError::Library { .. }) => {
                self.refused.get_or_insert(error);
                Ok(None)
            }
            result => result.map(Some),
        }
    }

    /// Computes it once with the fewest rows and once with the most: what the library advises for some, it may refuse for others.
    fn try_out(&mut self, of: Measured, gemm: GemmId) -> Result<(), DeviceError> {
        for rows in [of.from, of.up_to] {
            self.prepare(of.part, rows, 1, GemmChoices::of(of.part, of.up_to, gemm))?;
            launch_all(self.device, self.addresses, self.launches)?;
        }
        self.device.wait()
    }

    /// Lists the product in so many layers.
    fn prepare(
        &mut self,
        part: LayerPart,
        rows: usize,
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
        self.prepare(of.part, of.up_to, layers, choices)?;
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
        let choice = |part, up_to, gemm: Option<usize>, kernels| {
            GemmChoice::new(part, up_to, kernels, gemm.map(|gemm| (2.0, GemmId(gemm))))
        };
        let choices = GemmChoices(vec![
            choice(Out, 128, Some(3), Some(2.1)),
            choice(Out, 256, Some(4), Some(2.01)),
            choice(Down, 4_096, Some(5), None),
            choice(Qkv, 256, None, None),
        ]);
        for (part, rows, expect) in [
            (Out, 64, None),
            (Out, 65, Some(3)),
            (Out, 128, Some(3)),
            (Out, 129, None),
            (Down, 65, Some(5)),
            (Down, 4_096, Some(5)),
            (Down, 9_000, Some(5)),
            (Qkv, 100, None),
        ] {
            assert_eq!(choices.gemm(part, rows), expect.map(GemmId), "{part:?} {rows}");
        }
        let words = GemmChoice::summary(choices.all());
        assert_eq!(words.as_deref(), Some("out to 128, down to 4096 rows"));
        assert_eq!(GemmChoice::summary(&[choice(Out, 256, None, None)]), None);
        let shown = choices.all()[0].to_string();
        assert_eq!(shown, "out to 128 rows 2000000.0 us, kernels 2100000.0 us");
    }
}
