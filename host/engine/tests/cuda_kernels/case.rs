//! What the tests of all kernels share: a launch with its buffers by value, and what must come of it.

use half::{bf16, f16};

use crate::shim::{Arg, Launch, Shim};

/// Bytes that nobody wrote: NaN in every type.
pub(crate) const POISON: u8 = 0xff;

/// The element type of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    F32,
    F16,
    Bf16,
}

/// A launch whose buffers are allocated for it.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    kernel: String,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    args: Vec<Given>,
}

#[derive(Clone, Debug)]
enum Given {
    Value(Arg),
    In(Vec<u8>),
    Out(Vec<u8>),
}

/// Looks at the buffers that a call wrote, in the order of its arguments.
pub(crate) type Check = Box<dyn Fn(&[Vec<u8>]) -> Result<(), String>>;

/// A call and what must come of it.
pub(crate) struct Case {
    pub(crate) what: String,
    pub(crate) call: Call,
    pub(crate) check: Check,
}

/// What a call wrote, and the barriers that it met.
pub(crate) struct Done {
    pub(crate) outs: Vec<Vec<u8>>,
    pub(crate) sites: Vec<String>,
}

/// SplitMix64.
#[derive(Debug)]
pub(crate) struct Rng(pub(crate) u64);

// === impl Element ===

impl Element {
    pub(crate) const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    pub(crate) fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// The largest relative error of a whole output.
    pub(crate) fn tolerance(self) -> f64 {
        if self == Self::F32 { 1e-5 } else { 1e-2 }
    }

    pub(crate) fn encode(self, values: &[f64]) -> Vec<u8> {
        let one = |&v: &f64| match self {
            Self::F32 => (v as f32).to_le_bytes().to_vec(),
            Self::F16 => f16::from_f64(v).to_le_bytes().to_vec(),
            Self::Bf16 => bf16::from_f64(v).to_le_bytes().to_vec(),
        };
        values.iter().flat_map(one).collect()
    }

    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f64> {
        let two = |b: &[u8]| [b[0], b[1]];
        let one = |b: &[u8]| match self {
            Self::F32 => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::F16 => f16::from_le_bytes(two(b)).to_f64(),
            Self::Bf16 => bf16::from_le_bytes(two(b)).to_f64(),
        };
        bytes.chunks_exact(self.bytes()).map(one).collect()
    }

    /// Values that the type holds exactly.
    pub(crate) fn random(self, rng: &mut Rng, n: usize) -> Vec<f64> {
        let values: Vec<f64> = (0..n).map(|_| rng.unit()).collect();
        self.decode(&self.encode(&values))
    }
}

// === impl Call ===

impl Call {
    pub(crate) fn new(kernel: &str, grid: [usize; 3], block: u32) -> Self {
        let grid = grid.map(|n| n as u32);
        Self { kernel: kernel.to_owned(), grid, block, shared: 0, args: Vec::new() }
    }

    /// An entry of a unit with elements.
    pub(crate) fn typed(kernel: &str, element: Element, grid: [usize; 3], block: u32) -> Self {
        Self::new(&format!("{kernel}_{}", element.name()), grid, block)
    }

    fn with(mut self, given: Given) -> Self {
        self.args.push(given);
        self
    }

    pub(crate) fn shared(mut self, bytes: u32) -> Self {
        self.shared = bytes;
        self
    }

    pub(crate) fn u32(self, v: usize) -> Self {
        self.with(Given::Value(Arg::U32(v as u32)))
    }

    pub(crate) fn u64(self, v: usize) -> Self {
        self.with(Given::Value(Arg::U64(v as u64)))
    }

    pub(crate) fn f32(self, v: f64) -> Self {
        self.with(Given::Value(Arg::F32(v as f32)))
    }

    pub(crate) fn null(self) -> Self {
        self.with(Given::Value(Arg::Address(0)))
    }

    pub(crate) fn bytes(self, bytes: Vec<u8>) -> Self {
        self.with(Given::In(bytes))
    }

    pub(crate) fn words(self, words: &[u32]) -> Self {
        self.bytes(words_to_bytes(words))
    }

    /// The count that a launch begins with.
    pub(crate) fn count(self, n: usize) -> Self {
        self.words(&[n as u32])
    }

    pub(crate) fn input(self, element: Element, values: &[f64]) -> Self {
        self.bytes(element.encode(values))
    }

    pub(crate) fn maybe(self, element: Element, values: Option<&[f64]>) -> Self {
        match values {
            Some(values) => self.input(element, values),
            None => self.null(),
        }
    }

    /// Written, and looked at afterwards.
    pub(crate) fn output(self, initial: Vec<u8>) -> Self {
        self.with(Given::Out(initial))
    }

    pub(crate) fn poisoned(self, bytes: usize) -> Self {
        self.output(vec![POISON; bytes])
    }

    pub(crate) fn run(&self, shim: &mut Shim, seed: u64, skip: &str) -> Result<Done, String> {
        let mut outs = Vec::new();
        let args: Vec<Arg> = self
            .args
            .iter()
            .map(|given| {
                let (bytes, is_out) = match given {
                    Given::Value(arg) => return *arg,
                    Given::In(bytes) => (bytes, false),
                    Given::Out(bytes) => (bytes, true),
                };
                let address = shim.allocate(bytes.len());
                shim.write(address, bytes);
                if is_out {
                    outs.push((address, bytes.len()));
                }
                Arg::Address(address)
            })
            .collect();
        let Self { kernel, grid, block, shared, .. } = self;
        let launch = Launch { kernel, grid: *grid, block: *block, shared: *shared, args: &args, seed, skip };
        let sites = shim.launch(&launch)?;
        let read = |(address, len)| {
            let mut bytes = vec![0; len];
            shim.read(address, &mut bytes);
            bytes
        };
        Ok(Done { outs: outs.into_iter().map(read).collect(), sites })
    }
}

// === impl Rng ===

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In [-1, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// A permutation of the numbers below `n`.
    pub(crate) fn shuffled(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

pub(crate) fn words_to_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

pub(crate) fn bytes_to_words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// A check of one output: its first values, in this type and to this relative error, and poison in all that follows.
pub(crate) fn close(element: Element, tolerance: f64, expect: Vec<f64>) -> Check {
    Box::new(move |outs| is_close(element, tolerance, &expect, &outs[0]))
}

pub(crate) fn is_close(element: Element, tolerance: f64, expect: &[f64], found: &[u8]) -> Result<(), String> {
    let (found, rest) = found.split_at(expect.len() * element.bytes());
    if let Some(at) = rest.iter().position(|&byte| byte != POISON) {
        return Err(format!("byte {at} after the last live value was written"));
    }
    let found = element.decode(found);
    let error: f64 = expect.iter().zip(&found).map(|(e, f)| (e - f) * (e - f)).sum();
    let size: f64 = expect.iter().map(|e| e * e).sum();
    let relative = (error / size.max(f64::MIN_POSITIVE)).sqrt();
    if relative < tolerance {
        return Ok(());
    }
    let is_near = |i: usize| (expect[i] - found[i]).abs() <= tolerance * (1.0 + expect[i].abs());
    let at = (0..expect.len()).find(|&i| !is_near(i));
    let at = at.unwrap_or_default();
    Err(format!("relative error {relative:e}; value {at} is {} instead of {}", found[at], expect[at]))
}

/// Runs cases under two orders of threads, which must not change a bit.
pub(crate) fn check_all(cases: Vec<Case>) {
    let Some(mut shim) = Shim::start() else { return };
    let mut faults = Vec::new();
    for Case { what, call, check } in cases {
        let mut run = |seed| match call.run(&mut shim, seed, "") {
            Ok(done) => check(&done.outs).map(|()| done.outs),
            Err(fault) => {
                shim = Shim::start().expect("it started before");
                Err(fault)
            }
        };
        match (run(1), run(2)) {
            (Ok(one), Ok(other)) if one == other => {}
            (Ok(_), Ok(_)) => faults.push(format!("{what}: the order of threads changes the result")),
            (Err(fault), _) | (_, Err(fault)) => faults.push(format!("{what}: {fault}")),
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}
