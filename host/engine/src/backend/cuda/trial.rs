//! A product by each kernel that can compute it: what a person compares who chooses between them.
//!
//! A step takes the kernel of [`Kernel::of_product`] and as many runs as multiprocessors want. Both are guesses until they
//! are measured beside the others, on the same device and with weights that no cache holds.

use super::device::{Device, DeviceError, DeviceLaunch, Entries, Value, fill};
use super::element::Form;
use super::launch::Kernel;
use super::layout::{MAX_RUNS, PARTS_BYTES, WARPS};

/// Tiles of all runs for each multiprocessor, beyond which a product is not cut further.
const MOST_TILES: usize = 4;

/// Rows, k and columns of a product.
pub type Shape = [usize; 3];

/// A way to compute a product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// The kernel.
    pub entry: String,
    /// Its blocks; the last number is that of the runs.
    pub grid: [u32; 3],
    /// Whether a step would take it.
    pub is_taken: bool,
    block: u32,
    shared: u32,
    may_be_cut: bool,
}

/// Buffers for products of up to some shape, on a device.
#[derive(Debug)]
pub struct Trial<'a> {
    device: &'a mut dyn Device,
    form: Form,
    weights: u64,
    pool: u64,
    x: u64,
    y: u64,
    count: u64,
    parts: u64,
    counts: u64,
    entries: Entries,
    /// Launches so far: each reads other weights.
    turn: u64,
    /// What stands at `count`.
    rows: u32,
}

/// Every way to compute a product on a device with so many multiprocessors.
#[must_use]
pub fn ways(form: Form, n_sms: u32, shape: Shape) -> Vec<Way> {
    let [rows, k, _] = shape;
    let taken = Kernel::of_product(shape, form, n_sms);
    let can = Kernel::ALL.into_iter().filter(|kernel| kernel.computes(rows) && kernel.exists(form));
    let of = |kernel: Kernel| {
        let ([columns, in_y, own], block, shared) = kernel.grid(form, n_sms, shape);
        let fits = |runs: &usize| columns * in_y * runs <= MOST_TILES * n_sms as usize && *runs <= k / 64;
        let mut runs: Vec<usize> =
            [2, 3, 4, 5, 6, MAX_RUNS].into_iter().filter(|_| kernel.may_be_cut()).filter(fits).collect();
        runs.extend([1, own]);
        runs.sort_unstable();
        runs.dedup();
        runs.into_iter().map(move |runs| Way {
            entry: kernel.product_entry(form),
            grid: [columns, in_y, runs].map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
            is_taken: kernel == taken && runs == own,
            block,
            shared,
            may_be_cut: kernel.may_be_cut(),
        })
    };
    can.flat_map(of).collect()
}

/// Bytes of a product's weight.
#[must_use]
pub fn weight_bytes(form: Form, [_, k, n]: Shape) -> u64 {
    form.numbers_bytes(n, k) + form.scales_bytes(n, k)
}

impl<'a> Trial<'a> {
    /// Room for products of up to so many rows, k and columns each, one after another with other weights of a pool of so many bytes.
    /// Weights and activations are a word throughout, in which bits of a mask are as good as random.
    ///
    /// # Errors
    /// The device has not so much memory.
    pub fn new(
        device: &'a mut dyn Device,
        form: Form,
        [rows, k, n]: Shape,
        (pool, word): (u64, [u32; 2]),
    ) -> Result<Self, DeviceError> {
        let tiles = MOST_TILES as u64 * u64::from(device.info().n_sms);
        let pool = pool.max(weight_bytes(form, [rows, k, n]));
        let x_bytes = (rows * k * form.element.bytes()) as u64;
        let mut trial = Self {
            form,
            weights: device.allocate(pool)?,
            pool,
            x: device.allocate(x_bytes)?,
            y: device.allocate((rows * n * 4) as u64)?,
            count: device.allocate(4)?,
            parts: device.allocate(tiles * PARTS_BYTES)?,
            counts: device.allocate(tiles * WARPS * 4)?,
            device,
            entries: Entries::default(),
            turn: 0,
            rows: 0,
        };
        trial.fill(trial.weights, pool, word)?;
        trial.fill(trial.x, x_bytes, word)?;
        Ok(trial)
    }

    fn fill(&mut self, to: u64, bytes: u64, word: [u32; 2]) -> Result<(), DeviceError> {
        let kernel = self.entries.number_of(self.device, "fill_words")?;
        fill(self.device, kernel, (to, bytes), word)
    }

    /// Puts other activations in their place, in the type of the form, and no number where results go.
    ///
    /// # Errors
    /// The driver's.
    pub fn ask(&mut self, [rows, _, n]: Shape, x: &[u8]) -> Result<(), DeviceError> {
        self.device.upload(self.x, x)?;
        self.fill(self.y, (rows * n * 4) as u64, [f32::NAN.to_bits(), 0])
    }

    /// Launches it so often, each time with other weights, and waits.
    ///
    /// # Errors
    /// The driver's.
    pub fn run(&mut self, way: &Way, shape: Shape, launches: u64) -> Result<(), DeviceError> {
        let [rows, k, n] = shape.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let kernel = self.entries.number_of(self.device, &way.entry)?;
        if self.rows != rows {
            self.device.upload(self.count, &rows.to_le_bytes())?;
            self.rows = rows;
        }
        let bytes = weight_bytes(self.form, shape).next_multiple_of(256);
        for _ in 0..launches {
            let weight = self.weights + self.turn % (self.pool / bytes).max(1) * bytes;
            self.turn += 1;
            let scales = self.form.suffix().map(|_| weight + self.form.numbers_bytes(shape[2], shape[1]));
            let from = [self.count, weight].into_iter().chain(scales).chain([self.x, 0, self.y]).map(Value::Address);
            // The result is a float.
            let sizes = [k, n, 1].map(Value::U32);
            let cut = [self.parts, self.counts].map(Value::Address).into_iter().filter(|_| way.may_be_cut);
            let args: Vec<Value> = from.chain(sizes).chain(cut).collect();
            let (grid, block, shared) = (way.grid, way.block, way.shared);
            self.device.launch(&DeviceLaunch { kernel, grid, block, shared, args: &args })?;
        }
        self.device.wait()
    }

    /// What the last one came to, row by row.
    ///
    /// # Errors
    /// The driver's.
    pub fn result(&mut self, [rows, _, n]: Shape) -> Result<Vec<f32>, DeviceError> {
        let mut words = vec![0; rows * n];
        self.device.download(self.y, &mut words)?;
        Ok(words.into_iter().map(f32::from_bits).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Precision;
    use crate::backend::cuda::element::Element;

    #[test]
    fn one_way_of_each_product_is_a_steps() {
        for (precision, rows, expect) in [
            (Precision::F16, 1, "gemv_b1_bf16"),
            (Precision::F16, 16, "gemm_m16_bf16"),
            (Precision::F16, 64, "gemm_m64_bf16"),
            (Precision::Q8_0, 8, "gemm_m8_q8_bf16"),
            (Precision::Fp8, 96, "gemm_m128_fp8_bf16"),
        ] {
            let form = Form { element: Element::Bf16, precision };
            for (k, n) in [(4_096, 4_096), (14_336, 4_096), (4_096, 128_256)] {
                let ways = ways(form, 132, [rows, k, n]);
                let taken: Vec<&Way> = ways.iter().filter(|way| way.is_taken).collect();
                assert_eq!(taken.iter().map(|way| &way.entry).collect::<Vec<_>>(), [expect], "{rows} rows");
                assert!(ways.len() >= 3, "{ways:?}");
            }
        }
        let form = Form::from(Element::Bf16);
        let cut = |n| ways(form, 132, [64, 4_096, n]).into_iter().filter(|way| way.entry == "gemm_m64_bf16");
        assert_eq!(
            cut(4_096).map(|way| (way.grid[2], way.is_taken)).collect::<Vec<_>>(),
            [(1, false), (2, false), (3, false), (4, true), (5, false), (6, false), (8, false)]
        );
        assert_eq!(cut(128_256).map(|way| (way.grid[2], way.is_taken)).collect::<Vec<_>>(), [(1, true)]);
    }
}
