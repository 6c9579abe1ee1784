//! Who gets how much of a device's memory, decided before anything is allocated.
//!
//! Pure arithmetic over a model's footprint and the bytes that are free, so that a load which cannot succeed is refused in
//! words that say what would fit, and not by an allocation that fails half-way. The KV pool takes what is left: trying sizes
//! until one fits, as allocators invite one to, would leave nothing for graphs and for the driver.

use std::fmt;

use super::element::{Element, Form};
use crate::backend::cpu::Precision;

/// Least that is left to the driver, and the share of the device that is left where that is more: graphs, local memory of
/// kernels and a second process that looks at the device need some.
const RESERVE_BYTES: u64 = 256 << 20;
const RESERVE_PERCENT: u64 = 2;

/// What a captured graph costs, generously: each of its nodes takes a few hundred bytes on the device.
pub(crate) const GRAPH_NODE_BYTES: u64 = 4 << 10;

/// Memory of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VramFree {
    /// What the device has.
    pub total: u64,
    /// What nobody holds now.
    pub free: u64,
}

/// Bytes of device memory by owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VramUse {
    /// Weights and tables.
    pub weights: u64,
    /// Pages of keys and values.
    pub kv: u64,
    /// Activations, step inputs and outputs, sampling scratch.
    pub workspace: u64,
    /// Captured graphs, an estimate: the driver does not say.
    pub graphs: u64,
    /// Left to the driver.
    pub reserve: u64,
}

/// What a model needs in one precision, whatever the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Type of activations and pages, and how weights are kept.
    pub form: Form,
    /// Weights and tables.
    pub weights: u64,
    /// For the largest step.
    pub workspace: u64,
    /// For all buckets.
    pub graphs: u64,
    /// A page: keys and values of `block_tokens` positions in every layer.
    pub block_bytes: u64,
    /// Positions in a page.
    pub block_tokens: u32,
    /// Positions that a sequence may have.
    pub context_tokens: u32,
    /// Sequences that may run at once.
    pub max_rows: u32,
}

/// How large the KV pool shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvWish {
    /// One part in this many of what is left, because that many engines will share it; at most what `max_rows` full contexts
    /// can use.
    Share(u32),
    /// So many bytes.
    Bytes(u64),
}

/// A pool of a model that is on the device already, and that can shrink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolShare {
    /// What it has.
    pub bytes: u64,
    /// What it must keep.
    pub least: u64,
}

/// A division of the memory that fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VramPlan {
    /// For this footprint.
    pub footprint: Footprint,
    /// By owner.
    pub bytes: VramUse,
    /// Pages of the KV pool.
    pub n_blocks: u32,
}

/// Memory that does not suffice. The configuration or the choice of device is at fault; a retry helps only when somebody
/// else gives memory back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the model does not fit on this device: weights {weights} ({form}), workspace {workspace}, graphs {graphs}, \
     reserve {reserve} and {kv} are {needed}, and {free} of {total} are free; {advice}",
    weights = Bytes(needs.weights), workspace = Bytes(needs.workspace),
    graphs = Bytes(needs.graphs), reserve = Bytes(needs.reserve), kv = wish.of(Bytes(needs.kv)), needed = Bytes(needs.sum()),
    free = Bytes(memory.free), total = Bytes(memory.total)
)]
pub struct VramError {
    /// In which form it was tried.
    pub form: Form,
    /// The least that it needs.
    pub needs: VramUse,
    /// How large the KV pool was to be.
    pub wish: KvWish,
    /// What there is.
    pub memory: VramFree,
    /// What would fit.
    pub advice: Advice,
}

/// What would fit instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Another type of pages, or weights that are kept in less.
    Form(Form),
    /// Sequences of at most so many positions.
    Context(u32),
    /// A KV pool of at most so many bytes.
    Pool(u64),
    /// Nothing on this device: so many bytes are missing even for the shortest context.
    Larger(u64),
}

/// A number of bytes for a person.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl VramFree {
    /// What is left to the driver.
    #[must_use]
    pub fn reserve(&self) -> u64 {
        RESERVE_BYTES.max(self.total / 100 * RESERVE_PERCENT)
    }
}

impl VramUse {
    /// All of it.
    #[must_use]
    pub fn sum(&self) -> u64 {
        let Self { weights, kv, workspace, graphs, reserve } = *self;
        weights + kv + workspace + graphs + reserve
    }
}

impl KvWish {
    /// Pools that it takes so many bytes for.
    fn of(self, kv: Bytes) -> String {
        match self {
            Self::Share(0 | 1) => format!("a KV pool of at least {kv} (one full context)"),
            Self::Share(engines) => {
                format!("KV pools of at least {kv} (one full context for each of {engines} engines)")
            }
            Self::Bytes(_) => format!("a KV pool of {kv} (engine.gpu_kv_mib)"),
        }
    }

    /// Engines that share what is left.
    fn parts(self) -> u64 {
        match self {
            Self::Share(parts) => parts.max(1).into(),
            Self::Bytes(_) => 1,
        }
    }
}

impl Footprint {
    /// Pages of one sequence of `tokens` positions.
    fn blocks_for(&self, tokens: u32) -> u64 {
        u64::from(tokens.div_ceil(self.block_tokens.max(1)))
    }

    /// Everything but the KV pool.
    fn fixed(&self, memory: VramFree) -> VramUse {
        let Self { weights, workspace, graphs, .. } = *self;
        VramUse { weights, kv: 0, workspace, graphs, reserve: memory.reserve() }
    }

    /// Divides the free memory. `others` are the footprints of the same model in other precisions, for the advice.
    ///
    /// # Errors
    /// It does not hold the model and one full context, or not the pool that was asked for.
    pub fn plan(&self, memory: VramFree, wish: KvWish, others: &[Self]) -> Result<VramPlan, VramError> {
        let fixed = self.fixed(memory);
        let left = memory.free.saturating_sub(fixed.sum());
        let context = self.blocks_for(self.context_tokens);
        let n_blocks = match wish {
            KvWish::Share(_) => {
                let useful = context * u64::from(self.max_rows);
                (left / wish.parts() / self.block_bytes).min(useful)
            }
            KvWish::Bytes(bytes) => bytes / self.block_bytes,
        };
        // Block ids have 32 bits.
        let n_blocks = n_blocks.min(u64::from(u32::MAX));
        let least = match wish {
            KvWish::Share(_) => context,
            KvWish::Bytes(_) => n_blocks.max(1),
        };
        if n_blocks < least || least * self.block_bytes > left {
            let needs = VramUse { kv: least * self.block_bytes * wish.parts(), ..fixed };
            return Err(VramError { form: self.form, needs, wish, memory, advice: self.advise(memory, wish, others) });
        }
        let bytes = VramUse { kv: n_blocks * self.block_bytes, ..fixed };
        Ok(VramPlan { footprint: *self, bytes, n_blocks: n_blocks as u32 })
    }

    fn advise(&self, memory: VramFree, wish: KvWish, others: &[Self]) -> Advice {
        let fits = |other: &&Self| other.weights < self.weights && other.plan(memory, wish, &[]).is_ok();
        if let Some(other) = others.iter().filter(fits).max_by_key(|other| other.weights) {
            return Advice::Form(other.form);
        }
        let fixed = self.fixed(memory).sum();
        let blocks = memory.free.saturating_sub(fixed) / wish.parts() / self.block_bytes;
        let tokens = u32::try_from(blocks * u64::from(self.block_tokens)).unwrap_or(u32::MAX);
        match wish {
            _ if blocks == 0 => Advice::Larger((fixed + self.block_bytes * wish.parts()).saturating_sub(memory.free)),
            KvWish::Share(_) => Advice::Context(tokens),
            KvWish::Bytes(_) => {
                // In whole MiB, as it is configured, and one block at least.
                let mib = (blocks * self.block_bytes) >> 20;
                Advice::Pool((mib << 20).max(self.block_bytes.next_multiple_of(1 << 20)))
            }
        }
    }
}

impl VramError {
    /// To how many bytes these pools are to shrink, of which smaller ones keep what they have and each what it must, so that the
    /// model fits and the pools to come are as large, or as they must be. `None` where that does not suffice, or where the pool's
    /// size was asked for.
    #[must_use]
    pub fn share(&self, pools: &[PoolShare]) -> Option<u64> {
        let KvWish::Share(_) = self.wish else { return None };
        let (parts, fixed) = (self.wish.parts(), self.needs.sum() - self.needs.kv);
        let have = self.memory.free + pools.iter().map(|pool| pool.bytes).sum::<u64>();
        let fits = |share: u64| {
            let kept: u64 = pools.iter().map(|pool| pool.bytes.min(share).max(pool.least)).sum();
            fixed + kept + parts * share.max(self.needs.kv / parts) <= have
        };
        let (mut fits_at, mut too_much) = (0, have + 1);
        if !fits(fits_at) {
            return None;
        }
        while too_much - fits_at > 1 {
            let middle = fits_at + (too_much - fits_at) / 2;
            if fits(middle) { fits_at = middle } else { too_much = middle }
        }
        Some(fits_at)
    }
}

impl VramPlan {
    /// Sequences of `tokens` positions that the pool holds at once.
    #[must_use]
    pub fn sequences_of(&self, tokens: u32) -> u64 {
        u64::from(self.n_blocks) / self.footprint.blocks_for(tokens).max(1)
    }
}

/// The footprint to take: the first of `footprints` (best first) that leaves room for one full context, with its plan. `smaller`
/// are others that may be advised and are not taken unasked.
///
/// # Errors
/// None fits; the error is that of the smallest.
pub(super) fn recommend(
    footprints: &[Footprint],
    smaller: &[Footprint],
    memory: VramFree,
    wish: KvWish,
) -> Result<VramPlan, VramError> {
    let all = [footprints, smaller].concat();
    let tried = footprints.iter().map(|footprint| footprint.plan(memory, wish, &all));
    let mut last = None;
    for plan in tried {
        match plan {
            Ok(plan) => return Ok(plan),
            Err(error) => last = Some(error),
        }
    }
    let nothing =
        || VramError { form: Element::F32.into(), needs: VramUse::default(), wish, memory, advice: Advice::Larger(0) };
    Err(last.unwrap_or_else(nothing))
}

impl fmt::Display for VramPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let VramUse { weights, kv, workspace, graphs, reserve } = self.bytes;
        let Footprint { form, context_tokens, max_rows, .. } = self.footprint;
        write!(
            f,
            "weights {} ({form}), KV pool {} ({} blocks), workspace {}, graphs {}, reserve {}: up to {max_rows} sequences at \
             once, {} of {context_tokens} tokens each or {} of 1024",
            Bytes(weights),
            Bytes(kv),
            self.n_blocks,
            Bytes(workspace),
            Bytes(graphs),
            Bytes(reserve),
            self.sequences_of(context_tokens).min(max_rows.into()),
            self.sequences_of(1_024.min(context_tokens)).min(max_rows.into()),
        )
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Form(form) if form.precision != Precision::F16 => {
                write!(f, "as {form} it fits (--precision {})", form.precision.name())
            }
            Self::Form(form) => write!(f, "as {form} it fits"),
            Self::Context(tokens) => {
                write!(f, "with sequences of at most {tokens} tokens it fits (engine.max_context = {tokens})")
            }
            Self::Pool(bytes) => write!(f, "with engine.gpu_kv_mib = {} it fits", bytes >> 20),
            Self::Larger(missing) => {
                let missing = Bytes(*missing);
                write!(
                    f,
                    "{missing} are missing even for the shortest context: choose another device, or free some of this one's"
                )
            }
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n >= 1 << 30 => write!(f, "{:.2} GiB", n as f64 / (1u64 << 30) as f64),
            n => write!(f, "{:.1} MiB", n as f64 / (1u64 << 20) as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// Llama-3.1-8B: 8.03e9 weights, 32 layers of 1,024 key and as many value numbers.
    fn llama_8b(form: impl Into<Form>) -> Footprint {
        let form = form.into();
        let size = form.element.bytes() as u64;
        Footprint {
            form,
            weights: form.numbers_bytes(8_030_000, 1_000) + form.scales_bytes(8_030_000, 1_000),
            workspace: GIB / 2,
            graphs: 16 << 20,
            block_bytes: 2 * 32 * 1_024 * 16 * size,
            block_tokens: 16,
            context_tokens: 8_192,
            max_rows: 64,
        }
    }

    fn device(total: u64, free: u64) -> VramFree {
        VramFree { total: total * GIB, free: free * GIB }
    }

    #[test]
    fn the_pool_takes_what_is_left_and_no_more_than_is_of_use() {
        let bf16 = llama_8b(Element::Bf16);
        for (memory, wish, expect_blocks) in [
            // 24 GiB: 14.96 of weights and 1 of the rest leave 8.05 GiB, of 2 MiB a block.
            (device(24, 24), KvWish::Share(1), 4_120),
            (device(24, 24), KvWish::Share(2), 2_060),
            (device(80, 80), KvWish::Share(1), 32_218),
            // 64 full contexts of 512 blocks: a larger pool would never be full.
            (device(140, 139), KvWish::Share(1), 64 * 512),
            (device(24, 24), KvWish::Bytes(GIB), 512),
        ] {
            let plan = bf16.plan(memory, wish, &[]).expect("it fits");
            assert_eq!(plan.n_blocks, expect_blocks, "{memory:?} {wish:?}");
            assert!(plan.bytes.sum() <= memory.free, "{plan:?}");
            assert_eq!(plan.bytes.kv, u64::from(plan.n_blocks) * bf16.block_bytes);
        }
        let plan = bf16.plan(device(24, 24), KvWish::Share(1), &[]).expect("it fits");
        assert_eq!((plan.sequences_of(8_192), plan.sequences_of(1_024), plan.sequences_of(1)), (8, 64, 4_120));
    }

    #[test]
    fn a_model_that_does_not_fit_is_told_what_would() {
        let (f32, bf16) = (llama_8b(Element::F32), llama_8b(Element::Bf16));
        let q8_0 = llama_8b(Form { element: Element::Bf16, precision: Precision::Q8_0 });
        let others = [f32, bf16, q8_0];
        for (footprint, memory, wish, expect) in [
            (f32, device(24, 24), KvWish::Share(1), "as bf16 it fits"),
            (bf16, device(16, 16), KvWish::Share(1), "as q8_0 with bf16 it fits"),
            (bf16, device(16, 16), KvWish::Share(1), "(--precision q8_0)"),
            (q8_0, device(9, 9), KvWish::Share(1), "with sequences of at most 2"),
            (bf16, device(8, 8), KvWish::Share(1), "choose another device"),
            (bf16, device(80, 10), KvWish::Share(1), "10.00 GiB of 80.00 GiB are free"),
            (bf16, device(24, 24), KvWish::Bytes(20 * GIB), "a KV pool of 20.00 GiB (engine.gpu_kv_mib) are"),
            (bf16, device(24, 24), KvWish::Bytes(20 * GIB), "with engine.gpu_kv_mib = 8240 it fits"),
            (bf16, device(15, 15), KvWish::Bytes(20 * GIB), "are missing"),
            // Three engines are to share what is left: too little for each.
            (
                bf16,
                device(17, 17),
                KvWish::Share(3),
                "KV pools of at least 3.00 GiB (one full context for each of 3 engines)",
            ),
            (q8_0, device(9, 9), KvWish::Share(3), "engine.max_context = "),
        ] {
            let error = footprint.plan(memory, wish, &others).expect_err("too large").to_string();
            assert!(error.contains(expect), "{error}");
        }
        // As the model comes: 8.05 GiB are left for 16 GiB of one sequence.
        let long = Footprint { context_tokens: 131_072, ..bf16 };
        let error = long.plan(device(24, 24), KvWish::Share(1), &[]).expect_err("too long").to_string();
        assert!(error.ends_with("at most 65920 tokens it fits (engine.max_context = 65920)"), "{error}");
    }

    #[test]
    fn pools_make_room_for_one_more_by_shares() {
        let bf16 = llama_8b(Element::Bf16);
        let context = 512 * bf16.block_bytes;
        let error = |free| bf16.plan(device(80, free), KvWish::Share(1), &[]).expect_err("too little is left");
        // Fixed parts: 14.96 GiB of weights, 0.52 of the rest, 1.6 of reserve.
        let fixed = error(2).needs.sum() - context;
        let pool = |bytes: u64| PoolShare { bytes: bytes * GIB, least: context };
        for (free, pools, expect) in [
            (2, vec![pool(50)], Some((52 * GIB - fixed) / 2)),
            (2, vec![pool(40), pool(20)], Some((62 * GIB - fixed) / 3)),
            // Small ones keep what they have, and nobody less than it must.
            (2, vec![pool(46), pool(4)], Some((48 * GIB - fixed) / 2)),
            (2, vec![pool(40), PoolShare { bytes: 12 * GIB, least: 12 * GIB }], Some((42 * GIB - fixed) / 2)),
            // One that is smaller than the least of who comes gives of what it need not have.
            (17, vec![PoolShare { bytes: 2 * GIB, least: 0 }], Some(19 * GIB - fixed - context)),
            (2, vec![pool(16)], None),
            (2, vec![], None),
        ] {
            assert_eq!(error(free).share(&pools), expect, "{pools:?}");
        }
        let asked = bf16.plan(device(80, 2), KvWish::Bytes(GIB), &[]).expect_err("too little is left");
        assert_eq!(asked.share(&[pool(50)]), None, "who asks for a size has asked for the others' too");
    }

    #[test]
    fn the_best_precision_that_fits_is_recommended() {
        let footprints = [llama_8b(Element::F32), llama_8b(Element::Bf16)];
        for (memory, expect) in
            [(device(80, 79), Some(Element::F32)), (device(24, 23), Some(Element::Bf16)), (device(8, 8), None)]
        {
            let found = recommend(&footprints, &[], memory, KvWish::Share(1));
            assert_eq!(found.as_ref().ok().map(|plan| plan.footprint.form.element), expect, "{found:?}");
        }
        // docs/devices.md shows these words.
        let words = recommend(&footprints, &[], device(24, 24), KvWish::Share(1)).expect("bf16 fits").to_string();
        let expect = "weights 14.96 GiB (bf16), KV pool 8.05 GiB (4120 blocks), workspace 512.0 MiB, graphs 16.0 MiB, reserve \
                      491.5 MiB: up to 64 sequences at once, 8 of 8192 tokens each or 64 of 1024";
        assert_eq!(words, expect);
        assert!(recommend(&[], &[], device(8, 8), KvWish::Share(1)).is_err());
    }
}
