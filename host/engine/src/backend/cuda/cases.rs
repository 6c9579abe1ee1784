//! Single kernels with their inputs and what must come of them, against references in `f64`.
//!
//! Here and not with the tests, because `pointsman gpu-check` runs on a GPU the very cases that the tests run on the kernels
//! compiled for the CPU; nothing that serves comes here. A case is data: buffers by value, and a look at what was written.
//! Outputs are poisoned, so that what nobody wrote shows, and so does what nobody should have written.

use std::fmt;

use half::{bf16, f16};

use super::element::Element;

pub mod attention;
pub mod experts;
pub mod memory;
pub mod model;
pub mod products;
pub mod quantised;
mod run;
pub mod sampling;

pub use run::{CaseError, CaseRunner, Placement};

/// How much further than the whole of an output one of its values may be from what it should be.
const FURTHEST: f64 = 5.0;

/// Bytes that nobody wrote: NaN in every type.
pub const POISON: u8 = 0xff;

/// A launch whose buffers are allocated for it.
#[derive(Clone, Debug)]
pub struct Call {
    /// Its entry point.
    pub kernel: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory, in bytes.
    pub shared: u32,
    /// In the kernel's order.
    pub args: Vec<Given>,
}

/// An argument by value.
#[derive(Clone, Debug)]
pub enum Given {
    /// A constant.
    U32(u32),
    /// A constant.
    U64(u64),
    /// A constant.
    F32(f32),
    /// An address that is left out.
    Null,
    /// A buffer that is read.
    In(Vec<u8>),
    /// A buffer that is written, as it is before.
    Out(Vec<u8>),
}

/// Looks at the buffers that a call wrote, in the order of its arguments.
pub type Check = Box<dyn Fn(&[Vec<u8>]) -> Result<(), String>>;

/// A call and what must come of it.
pub struct Case {
    /// The kernel, its type and its sizes.
    pub what: String,
    /// The launch.
    pub call: Call,
    /// What must come of it.
    pub check: Check,
}

/// SplitMix64.
#[derive(Debug)]
pub struct Rng(pub u64);

/// Every case of the kernels that have a type, in this one.
#[must_use]
pub fn typed(element: Element) -> Vec<Case> {
    let quantised = quantised::cases(element);
    let (model, experts) = (model::cases(element), experts::cases(element));
    [products::cases(element), quantised, model, experts, attention::cases(element)].into_iter().flatten().collect()
}

/// Every case of the kernels that have none.
#[must_use]
pub fn untyped() -> Vec<Case> {
    [sampling::cases(), experts::choices(), memory::cases()].into_iter().flatten().collect()
}

/// Sizes of real models, which take minutes on a CPU's threads and moments on a device.
#[must_use]
pub fn large(element: Element) -> Vec<Case> {
    [products::large(element), attention::large(element)].into_iter().flatten().collect()
}

// === impl Element ===

impl Element {
    /// The largest relative error of a whole output.
    #[must_use]
    pub fn tolerance(self) -> f64 {
        if self == Self::F32 { 1e-5 } else { 1e-2 }
    }

    /// As a device has them.
    #[must_use]
    pub fn encode(self, values: &[f64]) -> Vec<u8> {
        let one = |&v: &f64| match self {
            Self::F32 => (v as f32).to_le_bytes().to_vec(),
            Self::F16 => f16::from_f64(v).to_le_bytes().to_vec(),
            Self::Bf16 => bf16::from_f64(v).to_le_bytes().to_vec(),
        };
        values.iter().flat_map(one).collect()
    }

    /// Back from what a device has.
    #[must_use]
    pub fn decode(self, bytes: &[u8]) -> Vec<f64> {
        let two = |b: &[u8]| [b[0], b[1]];
        let one = |b: &[u8]| match self {
            Self::F32 => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::F16 => f16::from_le_bytes(two(b)).to_f64(),
            Self::Bf16 => bf16::from_le_bytes(two(b)).to_f64(),
        };
        bytes.chunks_exact(self.bytes()).map(one).collect()
    }

    /// Values that the type holds exactly.
    pub fn random(self, rng: &mut Rng, n: usize) -> Vec<f64> {
        let values: Vec<f64> = (0..n).map(|_| rng.unit()).collect();
        self.decode(&self.encode(&values))
    }
}

// === impl Call ===

impl Call {
    /// An entry of a unit without elements.
    #[must_use]
    pub fn new(kernel: &str, grid: [usize; 3], block: u32) -> Self {
        let grid = grid.map(|n| n as u32);
        Self { kernel: kernel.to_owned(), grid, block, shared: 0, args: Vec::new() }
    }

    /// An entry of a unit with elements.
    #[must_use]
    pub fn typed(kernel: &str, element: Element, grid: [usize; 3], block: u32) -> Self {
        Self::new(&format!("{kernel}_{element}"), grid, block)
    }

    fn with(mut self, given: Given) -> Self {
        self.args.push(given);
        self
    }

    /// With dynamic shared memory.
    #[must_use]
    pub fn shared(mut self, bytes: u32) -> Self {
        self.shared = bytes;
        self
    }

    /// Another argument: a constant.
    #[must_use]
    pub fn u32(self, v: usize) -> Self {
        self.with(Given::U32(v as u32))
    }

    /// Another argument: a constant.
    #[must_use]
    pub fn u64(self, v: usize) -> Self {
        self.with(Given::U64(v as u64))
    }

    /// Another argument: a constant.
    #[must_use]
    pub fn f32(self, v: f64) -> Self {
        self.with(Given::F32(v as f32))
    }

    /// Another argument: no address.
    #[must_use]
    pub fn null(self) -> Self {
        self.with(Given::Null)
    }

    /// Another argument: a buffer that is read.
    #[must_use]
    pub fn bytes(self, bytes: Vec<u8>) -> Self {
        self.with(Given::In(bytes))
    }

    /// Another argument: a buffer that is read.
    #[must_use]
    pub fn words(self, words: &[u32]) -> Self {
        self.bytes(words_to_bytes(words))
    }

    /// The count that a launch begins with.
    #[must_use]
    pub fn count(self, n: usize) -> Self {
        self.words(&[n as u32])
    }

    /// Another argument: a buffer that is read.
    #[must_use]
    pub fn input(self, element: Element, values: &[f64]) -> Self {
        self.bytes(element.encode(values))
    }

    /// Another argument: a buffer that is read, or no address.
    #[must_use]
    pub fn maybe(self, element: Element, values: Option<&[f64]>) -> Self {
        match values {
            Some(values) => self.input(element, values),
            None => self.null(),
        }
    }

    /// Another argument: a buffer that is written, and looked at afterwards.
    #[must_use]
    pub fn output(self, initial: Vec<u8>) -> Self {
        self.with(Given::Out(initial))
    }

    /// Another argument: a buffer that is written, in which nothing is before.
    #[must_use]
    pub fn poisoned(self, bytes: usize) -> Self {
        self.output(vec![POISON; bytes])
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case").field("what", &self.what).finish_non_exhaustive()
    }
}

// === impl Rng ===

impl Rng {
    /// Any number.
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In [-1, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// A permutation of the numbers below `n`.
    pub fn shuffled(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

/// Words as a device has them.
#[must_use]
pub fn words_to_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Back from what a device has.
#[must_use]
pub fn bytes_to_words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// A check of one output: its first values, in this type and to this relative error, and poison in all that follows.
#[must_use]
pub fn close(element: Element, tolerance: f64, expect: Vec<f64>) -> Check {
    Box::new(move |outs| is_close(element, tolerance, &expect, &outs[0]))
}

/// What [`close`] does.
///
/// # Errors
/// They are not, in words.
pub fn is_close(element: Element, tolerance: f64, expect: &[f64], found: &[u8]) -> Result<(), String> {
    let (found, rest) = found.split_at(expect.len() * element.bytes());
    if let Some(at) = rest.iter().position(|&byte| byte != POISON) {
        return Err(format!("byte {at} after the last live value was written"));
    }
    let found = element.decode(found);
    let error: f64 = expect.iter().zip(&found).map(|(e, f)| (e - f) * (e - f)).sum();
    let size: f64 = expect.iter().map(|e| e * e).sum();
    let relative = (error / size.max(f64::MIN_POSITIVE)).sqrt();
    // In a large output a single value that is wrong would be lost among the others.
    let typical = (size / expect.len().max(1) as f64).sqrt();
    let is_near = |i: usize| (expect[i] - found[i]).abs() <= FURTHEST * tolerance * (typical + expect[i].abs());
    let far = (0..expect.len()).find(|&i| !is_near(i));
    if relative < tolerance && far.is_none() {
        return Ok(());
    }
    let at = far.unwrap_or_default();
    Err(format!("relative error {relative:e}; value {at} is {} instead of {}", found[at], expect[at]))
}
