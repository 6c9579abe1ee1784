//! How long the products of an 8B model take by each kernel that can compute them, beside what reading their weights takes.

use pointsman_engine::Precision;
use pointsman_engine::cuda::{self, Form, Shape, Trial, Way};
use serde_json::{Value, json};

use super::Check;
use super::speed::{BF16, median};

/// Name, k and columns.
const PRODUCTS: [(&str, usize, usize); 5] = [
    ("qkv", 4_096, 6_144),
    ("out", 4_096, 4_096),
    ("gate and up", 4_096, 28_672),
    ("down", 14_336, 4_096),
    ("head", 4_096, 128_256),
];
const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 512];
/// The longest k and the most columns, for the most rows.
const LARGEST: Shape = [512, 14_336, 128_256];
/// A figure is the median of so many runs of so many launches.
const RUNS: usize = 7;
const LAUNCHES: u64 = 32;
/// Bytes of weights that are gone through: many times what a device's cache holds.
const POOL_BYTES: u64 = 2 << 30;
/// What weights are made of, and what of it is random: numbers that are none of the special ones in any form.
const WORD: [u32; 2] = [0x3c11_3b27, 0x8787_8787];

impl Check<'_> {
    pub(super) fn products(&mut self) -> anyhow::Result<()> {
        let bandwidth = self.stream()?;
        for precision in [Precision::F16, Precision::Fp8, Precision::Q8_0] {
            self.products_of(Form { precision, ..BF16 }, bandwidth)?;
        }
        Ok(())
    }

    fn products_of(&mut self, form: Form, bandwidth: f64) -> anyhow::Result<()> {
        let mut gpu = self.open(self.overlaps)?;
        let n_sms = self.gpu.info.n_sms;
        let mut trial = Trial::new(&mut gpu, form, LARGEST, (POOL_BYTES, WORD))?;
        let products = PRODUCTS.into_iter().flat_map(|product| ROWS.map(|rows| (product, rows)));
        for (i, ((name, k, n), rows)) in products.enumerate() {
            if self.is_late() {
                return self.report.skip("products", PRODUCTS.len() * ROWS.len() - i);
            }
            let shape = [rows, k, n];
            let floor = cuda::weight_bytes(form, shape) as f64 / bandwidth;
            let ways = cuda::ways(form, n_sms, shape);
            let times = ways.iter().map(|way| self.time_way(&mut trial, way, shape));
            let times = times.collect::<anyhow::Result<Vec<f64>>>()?;
            let listed: Vec<String> = ways.iter().zip(&times).map(|(way, s)| shown(way, *s, floor)).collect();
            let json: Vec<Value> = ways.iter().zip(&times).map(|(way, s)| told(way, *s)).collect();
            let words = format!("{name} in {form}, {rows} rows, floor {:.1} us: {}", floor * 1e6, listed.join(", "));
            let json = json!({"product": name, "form": form.to_string(), "rows": rows, "floor_seconds": floor,
                "ways": json});
            self.report.say(&words, json)?;
        }
        Ok(())
    }

    /// Seconds of a launch.
    fn time_way(&self, trial: &mut Trial<'_>, way: &Way, shape: Shape) -> anyhow::Result<f64> {
        trial.run(way, shape, LAUNCHES)?;
        let mut times = Vec::with_capacity(RUNS);
        for _ in 0..RUNS {
            let start = self.clock.nanos();
            trial.run(way, shape, LAUNCHES)?;
            times.push(self.clock.nanos() - start);
        }
        Ok(median(&mut times) / LAUNCHES as f64)
    }
}

fn shown(way: &Way, seconds: f64, floor: f64) -> String {
    let runs = if way.grid[2] > 1 { format!(" in {}", way.grid[2]) } else { String::new() };
    let mark = if way.is_taken { "*" } else { "" };
    format!("{}{runs}{mark} {:.1} us ({:.0} %)", way.entry, seconds * 1e6, floor / seconds * 100.0)
}

fn told(way: &Way, seconds: f64) -> Value {
    json!({"kernel": way.entry, "grid": way.grid, "taken": way.is_taken, "seconds": seconds})
}
