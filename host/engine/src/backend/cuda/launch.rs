//! The launches of a step, as data: which kernel, on which grid, with which buffers and constants.
//!
//! A pure function of the model and of the step's extent, so that what a GPU runs can be read, counted and run elsewhere: the
//! tests hand the very same list to the kernels compiled for the CPU. A captured graph is this list, recorded once per
//! bucket; nothing in it depends on a step's contents, which lie in buffers, counts included.

mod experts;

use std::ops::Range;

use super::device::{Gemm, GemmId, GemmOutput};
use super::element::{Element, Form};
use super::layout::{Buffer, LayerPart, N_ROWS, N_SAMPLED, N_SPLITS, N_TILES, N_TOKENS, N_WINDOW_SPLITS, Sizes, runs};
use crate::spec::{Activation, ModelSpec};

/// What a product does with its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Epilogue {
    Store = 0,
    StoreF32 = 1,
    AddToF32 = 2,
    SiluMul = 3,
    GeluMul = 4,
}

/// The kernels, in the order of their numbers on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    Embed,
    RmsNorm,
    NormAdd,
    RopeStore,
    Gemv1,
    Gemv2,
    Gemv4,
    Gemm,
    Gemm8,
    Gemm16,
    Gemm32,
    Gemm64,
    Gemm128,
    DecodeAttention,
    PrefillAttention,
    CapLogits,
    SampleRules,
    ArgmaxParts,
    SampleChoose,
    TakeSampled,
    Gated,
    RouterLogits,
    ChooseExperts,
    Experts8,
    Experts64,
    AddExperts,
    /// None of ours: a product that the device's library computes. Its arguments are the library's algorithm, the rows, and the
    /// addresses of the weight, of what it is multiplied by, of the result and of its workspace, with the bytes of that.
    LibraryGemm,
}

/// Upper bounds of what a launch computes: the sizes of its grids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) rows: usize,
    pub(crate) tokens: usize,
    /// Rows whose logits are wanted.
    pub(crate) sampled: usize,
    /// Rows of one token, whose attention is that of decodes.
    pub(crate) singles: usize,
    /// Tiles of prefill attention, of the other rows; 0 where there are none.
    pub(crate) tiles: usize,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Arg {
    /// An address: bytes into a buffer.
    At(Buffer, u64),
    U32(u32),
    U64(u64),
    F32(f32),
    /// An address that is left out.
    Null,
}

/// One launch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Launch {
    pub(crate) kernel: Kernel,
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    /// Dynamic shared memory, in bytes.
    pub(crate) shared: u32,
    /// Range in [`LaunchPlan::args`].
    pub(crate) args: Range<usize>,
}

/// Launches in order; flat, so that a step's list is built without allocating.
#[derive(Debug, Default)]
pub(crate) struct LaunchPlan {
    pub(crate) launches: Vec<Launch>,
    pub(crate) args: Vec<Arg>,
}

/// A product `y = x * w^T` of up to `rows` rows; `count` says where their number stands.
#[derive(Clone, Copy)]
struct Product {
    count: u64,
    rows: usize,
    weight: Buffer,
    bias: Arg,
    x: Buffer,
    y: Buffer,
    k: usize,
    n: usize,
    epilogue: Epilogue,
    /// Whether `rows` is their number.
    is_exact: bool,
}

// === impl Kernel ===

impl Kernel {
    /// Those with an entry point.
    pub(crate) const ALL: [Self; 26] = [
        Self::Embed,
        Self::RmsNorm,
        Self::NormAdd,
        Self::RopeStore,
        Self::Gemv1,
        Self::Gemv2,
        Self::Gemv4,
        Self::Gemm,
        Self::Gemm8,
        Self::Gemm16,
        Self::Gemm32,
        Self::Gemm64,
        Self::Gemm128,
        Self::DecodeAttention,
        Self::PrefillAttention,
        Self::CapLogits,
        Self::SampleRules,
        Self::ArgmaxParts,
        Self::SampleChoose,
        Self::TakeSampled,
        Self::Gated,
        Self::RouterLogits,
        Self::ChooseExperts,
        Self::Experts8,
        Self::Experts64,
        Self::AddExperts,
    ];

    /// Whether there is one for this form: tensor cores have no plain `f32`, and 8-bit weights take `gemm_m8` from three rows on.
    pub(crate) fn exists(self, form: Form) -> bool {
        let is_quantised = form.suffix().is_some();
        match self {
            Self::Gemm8 | Self::Gemm16 | Self::Gemm32 | Self::Gemm64 | Self::Gemm128 | Self::Experts8 => {
                form.element != Element::F32
            }
            Self::Gemv4 | Self::Gated | Self::LibraryGemm => !is_quantised,
            _ => true,
        }
    }

    /// Whether it computes a product of so many rows.
    pub(super) fn computes(self, rows: usize) -> bool {
        match self {
            Self::Gemv1 => rows == 1,
            Self::Gemv2 => rows <= 2,
            Self::Gemv4 => rows <= 4,
            Self::Gemm8 => rows <= 8,
            Self::Gemm16 => rows <= 16,
            Self::Gemm32 => rows <= 32,
            Self::Gemm | Self::Gemm64 | Self::Gemm128 => true,
            _ => false,
        }
    }

    /// Whether k may be cut into runs.
    pub(super) fn may_be_cut(self) -> bool {
        matches!(self, Self::Gemm64 | Self::Gemm128)
    }

    /// Columns and rows of a block of a product of so many rows, its threads, and its dynamic shared memory in bytes.
    fn block(self, rows: usize, form: Form) -> (usize, usize, u32, u32) {
        let is_quantised = form.suffix().is_some();
        match self {
            Self::Gemv1 | Self::Gemv2 => (8, rows, 128, 0),
            Self::Gemv4 => (16, rows, 128, 0),
            Self::Gemm8 | Self::Gemm16 | Self::Gemm32 => (32, rows, 256, 0),
            Self::Gemm64 if is_quantised => (128, 64, 128, 69_632),
            Self::Gemm64 => (128, 64, 256, 98_304),
            Self::Gemm128 => (128, 128, 256, if is_quantised { 76_800 } else { 98_304 }),
            _ => (64, 64, 128, 0),
        }
    }

    /// Grid, threads and dynamic shared memory for a product of so many rows, k and columns.
    pub(super) fn grid(self, form: Form, n_sms: u32, [rows, k, n]: [usize; 3]) -> ([usize; 3], u32, u32) {
        let (columns, at_once, block, shared) = self.block(rows, form);
        let (in_x, in_y) = (n.div_ceil(columns), rows.div_ceil(at_once));
        // Two blocks of the smaller tiles are on a multiprocessor at once at least, and one of the larger.
        let wanted = if self == Self::Gemm64 { 2 * n_sms } else { n_sms };
        let runs = if self.may_be_cut() { runs(wanted, in_x * in_y, k) } else { 1 };
        ([in_x, in_y, runs], block, shared)
    }

    /// The one for a product of so many rows and columns. Each block of `gemm_m32` reads all of the rows: where columns fill the device
    /// with wide tiles, fewer blocks read them.
    pub(super) fn of_product([rows, _, n]: [usize; 3], form: Form, n_sms: u32) -> Self {
        let (has, is_whole) = (|kernel: Self| kernel.exists(form), form.suffix().is_none());
        match rows {
            1 => Self::Gemv1,
            2 => Self::Gemv2,
            3..=4 if has(Self::Gemv4) => Self::Gemv4,
            3..=8 if has(Self::Gemm8) => Self::Gemm8,
            9..=16 if has(Self::Gemm16) => Self::Gemm16,
            17..=32 if is_whole && has(Self::Gemm64) && n >= 128 * n_sms as usize => Self::Gemm64,
            17..=32 if has(Self::Gemm32) => Self::Gemm32,
            33..=64 if has(Self::Gemm64) => Self::Gemm64,
            65.. if has(Self::Gemm128) => Self::Gemm128,
            _ => Self::Gemm,
        }
    }

    /// The entry point of one that computes a product.
    pub(super) fn product_entry(self, form: Form) -> String {
        let name = match self {
            Self::Gemv1 => "gemv_b1",
            Self::Gemv2 => "gemv_b2",
            Self::Gemv4 => "gemv_b4",
            Self::Gemm8 => "gemm_m8",
            Self::Gemm16 => "gemm_m16",
            Self::Gemm32 => "gemm_m32",
            Self::Gemm64 => "gemm_m64",
            Self::Gemm128 => "gemm_m128",
            Self::Experts8 => "experts_m8",
            Self::Experts64 => "experts_m64",
            _ => "gemm",
        };
        let element = form.element;
        form.suffix().map_or_else(|| format!("{name}_{element}"), |suffix| format!("{name}_{suffix}_{element}"))
    }

    /// Its entry point.
    pub(crate) fn entry(self, sizes: &Sizes) -> String {
        let (element, head_dim) = (sizes.form.element, sizes.spec.head_dim);
        let name = match self {
            Self::Embed => "embed",
            Self::RmsNorm => "rms_norm",
            Self::NormAdd => "norm_add",
            Self::RopeStore => "qk_rope_store",
            Self::DecodeAttention => return format!("decode_attention_d{head_dim}_{element}"),
            Self::PrefillAttention => return format!("prefill_attention_d{head_dim}_{element}"),
            Self::CapLogits => return "cap_logits".to_owned(),
            Self::SampleRules => return "sample_rules".to_owned(),
            Self::ArgmaxParts => return "argmax_parts".to_owned(),
            Self::SampleChoose => return "sample_choose".to_owned(),
            Self::TakeSampled => return "take_sampled".to_owned(),
            Self::ChooseExperts => return "choose_experts".to_owned(),
            Self::AddExperts => return "add_experts".to_owned(),
            Self::RouterLogits => "router_logits",
            Self::Gated => "gated",
            product => return product.product_entry(sizes.form),
        };
        match sizes.form.suffix().filter(|_| self == Self::Embed && sizes.spec.tied) {
            Some(suffix) => format!("{name}_{suffix}_{element}"),
            None => format!("{name}_{element}"),
        }
    }
}

impl Product {
    /// That of a layer's matrix.
    fn of(sizes: &Sizes, extent: Extent, layer: usize, part: LayerPart) -> Self {
        let ModelSpec { hidden, post_norms, .. } = sizes.spec;
        let ffn = sizes.ffn_of(layer);
        let (q_dim, kv_dim) = (sizes.spec.q_dim(), sizes.spec.kv_dim());
        // The result of a half goes to the residual stream, or to a norm on its way there.
        let half_ends = match post_norms {
            true => (Buffer::Normed, Epilogue::Store),
            false => (Buffer::Residual, Epilogue::AddToF32),
        };
        let bias = |part| optional(sizes, layer, part);
        let (bias, x, k, n, (y, epilogue)) = match part {
            LayerPart::Out => (bias(LayerPart::OutBias), Buffer::Mixed, q_dim, hidden, half_ends),
            LayerPart::GateUp => (Arg::Null, Buffer::Normed, hidden, 2 * ffn, (Buffer::Ffn, gating(&sizes.spec))),
            LayerPart::Down => (Arg::Null, Buffer::Ffn, ffn, hidden, half_ends),
            _ => {
                let to = (Buffer::Qkv, Epilogue::Store);
                (bias(LayerPart::QkvBias), Buffer::Normed, hidden, q_dim + 2 * kv_dim, to)
            }
        };
        let weight = Buffer::Layer(layer as u16, part);
        let (rows, is_exact) = (extent.tokens, extent.tiles > 0);
        Self { count: N_TOKENS, rows, weight, bias, x, y, k, n, epilogue, is_exact }
    }

    /// The algorithm of the device's library that computes it, if one shall.
    fn by_library(&self, sizes: &Sizes) -> Option<(LayerPart, GemmId)> {
        let Buffer::Layer(_, part) = self.weight else { return None };
        let may_be = self.is_exact && self.bias == Arg::Null;
        sizes.choices.gemm(part, self.rows).filter(|_| may_be).map(|gemm| (part, gemm))
    }
}

impl Extent {
    /// A step of at most `rows` decodes.
    pub(crate) fn decode(rows: usize) -> Self {
        Self { rows, tokens: rows, sampled: rows, singles: rows, tiles: 0 }
    }
}

// === impl LaunchPlan ===

impl LaunchPlan {
    pub(crate) fn clear(&mut self) {
        self.launches.clear();
        self.args.clear();
    }

    pub(crate) fn args_of(&self, launch: &Launch) -> &[Arg] {
        &self.args[launch.args.clone()]
    }

    fn push(&mut self, kernel: Kernel, grid: [usize; 3], block: u32, args: impl IntoIterator<Item = Arg>) {
        let start = self.args.len();
        self.args.extend(args);
        let grid = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        self.launches.push(Launch { kernel, grid, block, shared: 0, args: start..self.args.len() });
    }

    /// From the tokens of the step before to the token ids of one that follows it.
    pub(crate) fn take_sampled(&mut self, sizes: &Sizes, extent: Extent) {
        let inputs = sizes.inputs(extent);
        let input = |at: u64| Arg::At(Buffer::StepInputs, at);
        let args = [input(N_ROWS), input(inputs.follows), Arg::At(Buffer::Outputs, 0), input(inputs.tokens)];
        self.push(Kernel::TakeSampled, [extent.rows.div_ceil(256), 1, 1], 256, args);
    }

    /// From token ids to the logits of the rows that sample.
    pub(crate) fn forward(&mut self, sizes: &Sizes, extent: Extent) {
        let inputs = sizes.inputs(extent);
        let input = |at: u64| Arg::At(Buffer::StepInputs, at);
        let ModelSpec { hidden, vocab, tied, .. } = sizes.spec;
        let table = Buffer::Embedding;
        let from = [input(N_TOKENS), input(inputs.tokens), Arg::At(table, 0)].into_iter();
        let scales = scales(sizes, table, vocab, hidden).filter(|_| tied);
        let to = [Arg::At(Buffer::Residual, 0), u32_arg(hidden), Arg::F32(sizes.spec.embedding_scale)];
        self.push(Kernel::Embed, [extent.tokens, 1, 1], 256, from.chain(scales).chain(to));
        for layer in 0..sizes.spec.layers {
            self.attention_half(sizes, extent, layer);
            self.ffn_half(sizes, extent, layer);
        }
        if extent.sampled > 0 {
            self.head(sizes, extent.sampled, inputs.pick);
        }
    }

    /// Logits of the picked rows.
    pub(crate) fn head(&mut self, sizes: &Sizes, rows: usize, pick: u64) {
        let ModelSpec { hidden, vocab, tied, .. } = sizes.spec;
        self.norm(sizes, (rows, N_SAMPLED), Some(pick), Buffer::FinalNorm);
        let product = Product {
            count: N_SAMPLED,
            rows,
            weight: if tied { Buffer::Embedding } else { Buffer::Head },
            bias: Arg::Null,
            x: Buffer::Normed,
            y: Buffer::Logits,
            k: hidden,
            n: vocab,
            epilogue: Epilogue::StoreF32,
            is_exact: false,
        };
        self.product(sizes, &product);
        if let Some(cap) = sizes.spec.logit_cap {
            let (n, logits) = (Arg::At(Buffer::StepInputs, N_SAMPLED), Arg::At(Buffer::Logits, 0));
            let grid = [vocab.div_ceil(256), rows, 1];
            self.push(Kernel::CapLogits, grid, 256, [n, logits, u32_arg(vocab), Arg::F32(cap)]);
        }
    }

    fn attention_half(&mut self, sizes: &Sizes, extent: Extent, layer: usize) {
        let part = |part| Buffer::Layer(layer as u16, part);
        self.norm(sizes, (extent.tokens, N_TOKENS), None, part(LayerPart::AttentionNorm));
        self.product(sizes, &Product::of(sizes, extent, layer, LayerPart::Qkv));
        self.rope_store(sizes, extent, layer);
        if extent.singles > 0 {
            self.decode_attention(sizes, extent, layer);
        }
        if extent.tiles > 0 {
            self.prefill_attention(sizes, extent, layer);
        }
        self.product(sizes, &Product::of(sizes, extent, layer, LayerPart::Out));
        self.post_norm(sizes, extent.tokens, part(LayerPart::PostAttentionNorm));
    }

    /// Adds the norm of a half's result to the residual stream, in models that have one.
    fn post_norm(&mut self, sizes: &Sizes, rows: usize, gain: Buffer) {
        if !sizes.spec.post_norms {
            return;
        }
        let (n, x, delta) = (Arg::At(Buffer::StepInputs, N_TOKENS), Buffer::Residual, Buffer::Normed);
        let [eps, plus] = norm_scalars(&sizes.spec);
        let [x, delta, gain] = [x, delta, gain].map(|buffer| Arg::At(buffer, 0));
        self.push(Kernel::NormAdd, [rows, 1, 1], 256, [n, x, delta, gain, u32_arg(sizes.spec.hidden), eps, plus]);
    }

    fn ffn_half(&mut self, sizes: &Sizes, extent: Extent, layer: usize) {
        let part = |part| Buffer::Layer(layer as u16, part);
        self.norm(sizes, (extent.tokens, N_TOKENS), None, part(LayerPart::FfnNorm));
        if let Some(experts) = sizes.experts_of(layer) {
            self.experts(sizes, extent, layer, experts);
        } else {
            self.product(sizes, &Product::of(sizes, extent, layer, LayerPart::GateUp));
            self.product(sizes, &Product::of(sizes, extent, layer, LayerPart::Down));
        }
        self.post_norm(sizes, extent.tokens, part(LayerPart::PostFfnNorm));
    }

    /// A layer's product alone, of so many rows of a step with prompts.
    pub(super) fn product_of(&mut self, sizes: &Sizes, rows: usize, (layer, part): (usize, LayerPart)) {
        let extent = Extent { rows: 1, tokens: rows, sampled: 0, singles: 0, tiles: 1 };
        self.product(sizes, &Product::of(sizes, extent, layer, part));
    }

    /// Norm of the residual stream, of all rows or of picked ones.
    fn norm(&mut self, sizes: &Sizes, (rows, count): (usize, u64), pick: Option<u64>, gain: Buffer) {
        let [eps, plus] = norm_scalars(&sizes.spec);
        self.push(
            Kernel::RmsNorm,
            [rows, 1, 1],
            256,
            [
                Arg::At(Buffer::StepInputs, count),
                Arg::At(Buffer::Residual, 0),
                pick.map_or(Arg::Null, |at| Arg::At(Buffer::StepInputs, at)),
                Arg::At(gain, 0),
                Arg::At(Buffer::Normed, 0),
                u32_arg(sizes.spec.hidden),
                eps,
                plus,
            ],
        );
    }

    fn product(&mut self, sizes: &Sizes, product: &Product) {
        let Product { count, rows, weight, bias, x, y, k, n, epilogue, .. } = *product;
        if let Some(gemm) = product.by_library(sizes) {
            return self.product_by_library(sizes, product, gemm);
        }
        let kernel = Kernel::of_product([rows, k, n], sizes.form, sizes.n_sms);
        let ([columns, in_y, runs], block, shared) = kernel.grid(sizes.form, sizes.n_sms, [rows, k, n]);
        let from = [Arg::At(Buffer::StepInputs, count), Arg::At(weight, 0)].into_iter();
        let to = [Arg::At(x, 0), bias, Arg::At(y, 0), u32_arg(k), u32_arg(n), Arg::U32(epilogue as u32)];
        let args = from.chain(scales(sizes, weight, n, k)).chain(to);
        let cut = [Arg::At(Buffer::ProductParts, 0), Arg::At(Buffer::ProductCounts, 0)].into_iter();
        let cut = cut.filter(|_| kernel.may_be_cut());
        self.push(kernel, [columns, in_y, runs], block, args.chain(cut));
        if let Some(launch) = self.launches.last_mut() {
            launch.shared = shared;
        }
    }

    /// The library does not gate what it computes.
    fn product_by_library(&mut self, sizes: &Sizes, product: &Product, (part, gemm): (LayerPart, GemmId)) {
        let Product { count, rows, weight, x, y, k, n, epilogue, .. } = *product;
        let (size, ffn, is_gated) = (sizes.form.element.bytes(), n / 2, part == LayerPart::GateUp);
        let mut first = 0;
        while first < rows {
            let n_rows = sizes.rows_at_once(part, rows - first);
            let to = match epilogue {
                _ if is_gated => Arg::At(Buffer::GateUp, 0),
                Epilogue::AddToF32 => Arg::At(y, (first * n * 4) as u64),
                _ => Arg::At(y, (first * n * size) as u64),
            };
            let from = Arg::At(x, (first * k * size) as u64);
            let workspace = [Arg::At(Buffer::GemmWorkspace, 0), Arg::U64(sizes.gemm_workspace_bytes())];
            let args = [u32_arg(gemm.0), u32_arg(n_rows), Arg::At(weight, 0), from, to];
            self.push(Kernel::LibraryGemm, [1, 1, 1], 1, args.into_iter().chain(workspace));
            if is_gated {
                let grid = [ffn.div_ceil(256 * 16 / size), n_rows, 1];
                let args = [Arg::At(Buffer::StepInputs, count), to, Arg::At(y, 0), u32_arg(first), u32_arg(ffn)];
                self.push(Kernel::Gated, grid, 256, args.into_iter().chain([Arg::U32(epilogue as u32)]));
            }
            first += n_rows;
        }
    }

    fn rope_store(&mut self, sizes: &Sizes, extent: Extent, layer: usize) {
        let (spec, inputs) = (&sizes.spec, sizes.inputs(extent));
        let [eps, plus] = norm_scalars(spec);
        let (turns, rope) = match spec.window_rope.as_ref().filter(|_| spec.has_window_rope(layer)) {
            Some(rope) => (Buffer::WindowRope, rope),
            None => (Buffer::Rope, &spec.rope),
        };
        let input = |at: u64| Arg::At(Buffer::StepInputs, at);
        self.push(
            Kernel::RopeStore,
            [extent.tokens, (spec.heads + 2 * spec.kv_heads).div_ceil(4), 1],
            128,
            [
                input(N_TOKENS),
                Arg::At(Buffer::Qkv, 0),
                input(inputs.positions),
                input(inputs.row_of),
                input(inputs.tables),
                u32_arg(sizes.max_blocks()),
                Arg::At(turns, 0),
                u32_arg(rope.width),
                optional(sizes, layer, LayerPart::QNorm),
                optional(sizes, layer, LayerPart::KNorm),
                eps,
                plus,
                pages(sizes, layer),
                Arg::U64(sizes.page_elements()),
                u32_arg(spec.heads),
                u32_arg(spec.kv_heads),
                u32_arg(spec.head_dim),
                u32_arg(sizes.config.block_tokens),
            ],
        );
    }

    fn decode_attention(&mut self, sizes: &Sizes, extent: Extent, layer: usize) {
        let (spec, inputs) = (&sizes.spec, sizes.inputs(extent));
        let input = |at: u64| Arg::At(Buffer::StepInputs, at);
        let (count, splits) = match spec.window_of(layer) {
            Some(_) => (N_WINDOW_SPLITS, inputs.window_splits),
            None => (N_SPLITS, inputs.splits),
        };
        self.push(
            Kernel::DecodeAttention,
            [sizes.clusters(), sizes.most_splits(extent.singles), 1],
            128,
            [
                input(count),
                input(splits),
                Arg::At(Buffer::Qkv, 0),
                pages(sizes, layer),
                Arg::U64(sizes.page_elements()),
                input(inputs.tables),
                u32_arg(sizes.max_blocks()),
                Arg::At(Buffer::Mixed, 0),
                Arg::At(Buffer::AttentionParts, 0),
                Arg::At(Buffer::AttentionCounts, 0),
                u32_arg(spec.heads),
                u32_arg(spec.kv_heads),
                u32_arg(sizes.config.block_tokens),
                Arg::F32(spec.score_scale),
                Arg::F32(spec.score_cap.unwrap_or(0.0)),
            ],
        );
    }

    fn prefill_attention(&mut self, sizes: &Sizes, extent: Extent, layer: usize) {
        let (spec, inputs) = (&sizes.spec, sizes.inputs(extent));
        let input = |at: u64| Arg::At(Buffer::StepInputs, at);
        self.push(
            Kernel::PrefillAttention,
            [extent.tiles, spec.kv_heads, 1],
            128,
            [
                input(N_TILES),
                input(inputs.tiles),
                Arg::At(Buffer::Qkv, 0),
                pages(sizes, layer),
                Arg::U64(sizes.page_elements()),
                input(inputs.tables),
                u32_arg(sizes.max_blocks()),
                input(inputs.row_starts),
                input(inputs.lens),
                Arg::At(Buffer::Mixed, 0),
                u32_arg(spec.heads),
                u32_arg(spec.kv_heads),
                u32_arg(sizes.config.block_tokens),
                u32_arg(spec.window_of(layer).unwrap_or(0)),
                Arg::F32(spec.score_scale),
                Arg::F32(spec.score_cap.unwrap_or(0.0)),
            ],
        );
        if let Some(launch) = self.launches.last_mut() {
            launch.shared = Self::prefill_shared(sizes);
        }
    }

    /// Attention with the widest heads has its keys and values in dynamic shared memory.
    fn prefill_shared(sizes: &Sizes) -> u32 {
        if sizes.spec.head_dim == 256 && sizes.form.element != Element::F32 { 65_536 } else { 0 }
    }

    /// From logits to tokens, for up to `rows` rows.
    pub(crate) fn choose(&mut self, sizes: &Sizes, rows: usize) {
        let n = Arg::At(Buffer::StepInputs, N_SAMPLED);
        let (rules, logits) = (Arg::At(Buffer::Rules, 0), Arg::At(Buffer::Logits, 0));
        let lists = Arg::At(Buffer::Rules, sizes.lists_at(rows as u64));
        let vocab = u32_arg(sizes.spec.vocab);
        let parts = sizes.best_parts(rows);
        let (best, sampled) = (Arg::At(Buffer::Best, 0), Arg::At(Buffer::Outputs, 0));
        let tops = Arg::At(Buffer::Outputs, Sizes::tops_at(rows as u64));
        // History, biases, bans and masks share one stretch: each row's rules say where in it its own stand.
        self.push(
            Kernel::SampleRules,
            [rows, 1, 1],
            1_024,
            [n, rules, logits, lists, sampled, Arg::At(Buffer::Seen, 0), lists, lists, lists, vocab],
        );
        self.push(Kernel::ArgmaxParts, [parts as usize, rows, 1], 256, [n, logits, best, vocab]);
        self.push(
            Kernel::SampleChoose,
            [rows, 1, 1],
            1_024,
            [n, rules, logits, best, Arg::U32(parts as u32), sampled, tops, vocab],
        );
    }
}

/// What a library is asked for in place of a layer's product; `None` of one that it cannot compute, or that layers do not have alike.
pub(super) fn gemm_of(sizes: &Sizes, part: LayerPart) -> Option<Gemm> {
    if sizes.spec.experts.is_some() && matches!(part, LayerPart::GateUp | LayerPart::Down) {
        return None;
    }
    let Product { bias, k, n, epilogue, .. } = Product::of(sizes, sizes.largest(), 0, part);
    let output = match epilogue {
        Epilogue::AddToF32 => GemmOutput::AddToF32,
        _ => GemmOutput::Store,
    };
    (bias == Arg::Null).then_some(Gemm { element: sizes.form.element, k, n, output })
}

/// What a layer's product multiplies its weight by, and the numbers in a row of it.
pub(super) fn input_of(sizes: &Sizes, part: LayerPart) -> (Buffer, usize) {
    let Product { x, k, .. } = Product::of(sizes, sizes.largest(), 0, part);
    (x, k)
}

/// What becomes of gate and up.
fn gating(spec: &ModelSpec) -> Epilogue {
    match spec.activation {
        Activation::Silu => Epilogue::SiluMul,
        Activation::GeluTanh => Epilogue::GeluMul,
    }
}

fn u32_arg(n: usize) -> Arg {
    Arg::U32(u32::try_from(n).unwrap_or(u32::MAX))
}

/// Where the scales of a matrix of `n` rows stand, if it has any: behind its numbers.
fn scales(sizes: &Sizes, matrix: Buffer, n: usize, k: usize) -> Option<Arg> {
    sizes.form.suffix().map(|_| Arg::At(matrix, sizes.form.numbers_bytes(n, k)))
}

/// A layer's part of page 0.
fn pages(sizes: &Sizes, layer: usize) -> Arg {
    Arg::At(Buffer::Kv, layer as u64 * sizes.layer_elements() * sizes.form.element.bytes() as u64)
}

/// What every norm adds to the mean square, and to its gains.
fn norm_scalars(spec: &ModelSpec) -> [Arg; 2] {
    [Arg::F32(spec.norm_eps), Arg::F32(if spec.norm_plus_one { 1.0 } else { 0.0 })]
}

/// A part of a layer that the model may not have.
fn optional(sizes: &Sizes, layer: usize, part: LayerPart) -> Arg {
    if sizes.has(part) { Arg::At(Buffer::Layer(layer as u16, part), 0) } else { Arg::Null }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::EngineConfig;
    use crate::backend::cpu::Precision;
    use crate::backend::cuda::layout::Piece;
    use crate::backend::cuda::tune::GemmChoices;

    const Q8_0: Form = Form { element: Element::Bf16, precision: Precision::Q8_0 };
    const FP8: Form = Form { element: Element::F16, precision: Precision::Fp8 };

    const LLAMA_8B: &str = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}"#;

    /// Llama-3.1-8B on 132 multiprocessors.
    fn sizes(form: impl Into<Form>) -> Sizes {
        Sizes {
            spec: ModelSpec::from_config(LLAMA_8B.as_bytes()).expect("a Llama"),
            form: form.into(),
            config: EngineConfig {
                n_blocks: 2_048,
                block_tokens: 16,
                max_step_tokens: 2_048,
                max_rows: 128,
                context_tokens: 8_192,
            },
            n_sms: 132,
            has_library: true,
            choices: GemmChoices::default(),
        }
    }

    /// Of the size of Gemma-3-1B: wide heads, norms behind each half, two rotations, one key head.
    fn gemma() -> Sizes {
        let config = r#"{"architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144, "hidden_size": 1152,
            "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
            "intermediate_size": 6912, "max_position_embeddings": 32768, "sliding_window": 512,
            "final_logit_softcapping": 30.0}"#;
        Sizes { spec: ModelSpec::from_config(config.as_bytes()).expect("a Gemma"), ..sizes(Element::Bf16) }
    }

    /// Of the size of Qwen3-30B-A3B, with a dense layer.
    fn qwen3_moe(form: impl Into<Form>) -> Sizes {
        let config = r#"{"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
            "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
            "norm_topk_prob": true, "mlp_only_layers": [2], "max_position_embeddings": 40960}"#;
        Sizes { spec: ModelSpec::from_config(config.as_bytes()).expect("a Qwen3-MoE"), ..sizes(form) }
    }

    #[test]
    fn layers_with_experts_have_eleven_kernels() {
        use Kernel::{AddExperts, ChooseExperts, Experts8, Experts64, RouterLogits};
        let sizes = qwen3_moe(Element::Bf16);
        // How many tiles there may be: of 8 rows each an expert; of 512 rows at most one for each 8 of them and one an expert.
        for (extent, expect, tiles) in [
            (Extent::decode(1), Experts8, 8),
            (Extent::decode(64), Experts8, 176),
            (Extent::decode(128), Experts8, 240),
            (mixed(3, 129), Experts64, 142),
            (mixed(3, 2_048), Experts64, 382),
        ] {
            let plan = launched(&sizes, extent);
            let of = |kernel: Kernel| plan.launches.iter().filter(move |launch| launch.kernel == kernel);
            let counts =
                [RouterLogits, ChooseExperts, Experts8, Experts64, AddExperts].map(|kernel| of(kernel).count());
            let products = if expect == Experts8 { [6, 0] } else { [0, 6] };
            assert_eq!(counts, [3, 3, products[0], products[1], 3], "{extent:?}");
            assert!(of(expect).all(|launch| launch.grid[1] == tiles), "{:?}", of(expect).next());
            let with_prompts = if extent.tiles > 0 { 4 } else { 0 };
            assert_eq!(plan.launches.len(), 1 + 3 * 11 + 8 + with_prompts + 2 + 3, "{extent:?}");
        }
        let entries = |sizes: &Sizes| sizes.entries().filter(|(kernel, _)| kernel.is_of_experts()).count();
        assert_eq!([&sizes, &qwen3_moe(Element::F32), &self::sizes(Element::Bf16)].map(entries), [5, 4, 0]);
        assert_eq!([LayerPart::Down, LayerPart::Out].map(|part| gemm_of(&sizes, part).is_some()), [false, true]);
        // The dense layer's width, and what stands between the products of the other ones.
        assert_eq!([2, 3].map(|layer| sizes.ffn_of(layer)), [6_144, 768]);
        assert_eq!(sizes.most_ffn(10), 10 * 8 * 768);
    }

    #[test]
    fn a_gemma_has_its_norms_caps_and_rotations() {
        let sizes = gemma();
        let plan = launched(&sizes, Extent::decode(1));
        let count = |kernel: Kernel| plan.launches.iter().filter(|launch| launch.kernel == kernel).count();
        assert_eq!([Kernel::NormAdd, Kernel::RmsNorm, Kernel::CapLogits].map(count), [14, 15, 1]);
        let inputs = sizes.inputs(Extent::decode(1));
        let attention = plan.launches.iter().filter(|launch| launch.kernel == Kernel::DecodeAttention);
        let lists: Vec<&[Arg]> = attention.map(|launch| &plan.args_of(launch)[..2]).collect();
        let input = |at| Arg::At(Buffer::StepInputs, at);
        let in_window = [input(N_WINDOW_SPLITS), input(inputs.window_splits)];
        let of_all = [input(N_SPLITS), input(inputs.splits)];
        assert_eq!(lists, [&in_window[..], &in_window, &in_window, &in_window, &in_window, &of_all, &in_window]);
        let turned = plan.launches.iter().filter(|launch| launch.kernel == Kernel::RopeStore);
        let tables: Vec<Arg> = turned.map(|launch| plan.args_of(launch)[6]).collect();
        let expect = (1..=7).map(|i| if i % 6 == 0 { Buffer::Rope } else { Buffer::WindowRope });
        assert_eq!(tables, expect.map(|buffer| Arg::At(buffer, 0)).collect::<Vec<_>>());
        assert_eq!(Kernel::DecodeAttention.entry(&sizes), "decode_attention_d256_bf16");
        let prefill = launched(&sizes, mixed(3, 700));
        let shared = prefill.launches.iter().find(|launch| launch.kernel == Kernel::PrefillAttention);
        assert_eq!(shared.map(|launch| launch.shared), Some(65_536));
    }

    fn mixed(rows: usize, tokens: usize) -> Extent {
        Extent { rows, tokens, sampled: rows, singles: rows - 1, tiles: tokens.div_ceil(16) + 1 }
    }

    fn launched(sizes: &Sizes, extent: Extent) -> LaunchPlan {
        let mut plan = LaunchPlan::default();
        plan.forward(sizes, extent);
        plan.choose(sizes, extent.sampled);
        plan
    }

    #[test]
    fn a_step_has_eight_kernels_a_layer_and_nine_where_some_rows_have_more_than_a_token() {
        for (extent, expect) in [
            (Extent::decode(1), 1 + 32 * 8 + 2 + 3),
            (Extent::decode(64), 1 + 32 * 8 + 2 + 3),
            (mixed(3, 700), 1 + 32 * 9 + 2 + 3),
            (mixed(1, 700), 1 + 32 * 8 + 2 + 3),
            (Extent { sampled: 0, ..mixed(1, 256) }, 1 + 32 * 8 + 3),
        ] {
            assert_eq!(launched(&sizes(Element::Bf16), extent).launches.len(), expect, "{extent:?}");
        }
    }

    #[test]
    fn a_library_computes_products_of_prompts() {
        let plain = Sizes { choices: GemmChoices::of_all(4_096), ..sizes(Element::Bf16) };
        let mut biased = plain.clone();
        biased.spec.qkv_bias = true;
        // Of each layer, 1,500 rows of gate and up are gated in two parts; of more than 4,096 all products are computed in parts.
        for (sizes, extent, products, gated) in [
            (&plain, mixed(3, 1_500), 5, 2),
            (&plain, mixed(3, 1_024), 4, 1),
            (&plain, mixed(3, 65), 4, 1),
            (&plain, mixed(3, 5_000), 3 * 2 + 5, 5),
            (&plain, mixed(3, 7_169), 3 * 2 + 8, 8),
            (&biased, mixed(3, 65), 3, 1),
            (&plain, mixed(3, 64), 0, 0),
            (&plain, Extent::decode(128), 0, 0),
        ] {
            let launches = launched(sizes, extent).launches;
            let count = |kernel| launches.iter().filter(|launch| launch.kernel == kernel).count();
            assert_eq!([Kernel::LibraryGemm, Kernel::Gated].map(count), [32 * products, 32 * gated], "{extent:?}");
        }
        let rows = |part, rows| plain.rows_at_once(part, rows);
        assert_eq!([65, 1_024, 1_025, 1_500, 5_000].map(|n| rows(LayerPart::GateUp, n)), [65, 1_024, 640, 768, 1_024]);
        assert_eq!([65, 4_096, 5_000].map(|n| rows(LayerPart::Down, n)), [65, 4_096, 2_560]);
        // However long a step is, no part of it is short.
        let parts = launched(&plain, mixed(3, 7_169));
        let products = parts.launches.iter().filter(|launch| launch.kernel == Kernel::LibraryGemm);
        let shortest = products.map(|launch| match parts.args_of(launch)[1] {
            Arg::U32(rows) => rows,
            ref other => panic!("{other:?} rows"),
        });
        assert_eq!(shortest.min(), Some(769));
        let of = |part| gemm_of(&plain, part).map(|gemm| (gemm.k, gemm.n, gemm.output));
        assert_eq!(of(LayerPart::GateUp), Some((4_096, 28_672, GemmOutput::Store)));
        assert_eq!(of(LayerPart::Down), Some((14_336, 4_096, GemmOutput::AddToF32)));
        assert_eq!(gemm_of(&gemma(), LayerPart::Down).map(|gemm| gemm.output), Some(GemmOutput::Store));
        assert_eq!(gemm_of(&biased, LayerPart::Qkv), None);
    }

    #[test]
    fn products_take_the_kernel_for_their_rows() {
        use Kernel::{Gemm, Gemm8, Gemm16, Gemm32, Gemm64, Gemm128, Gemv1, Gemv2, Gemv4};
        for (rows, expect, expect_q8, expect_f32, grid) in [
            (1, Gemv1, Gemv1, Gemv1, [768, 1, 1]),
            (2, Gemv2, Gemv2, Gemv2, [768, 1, 1]),
            (4, Gemv4, Gemm8, Gemv4, [384, 1, 1]),
            (8, Gemm8, Gemm8, Gemm, [192, 1, 1]),
            (16, Gemm16, Gemm16, Gemm, [192, 1, 1]),
            (32, Gemm32, Gemm32, Gemm, [192, 1, 1]),
            (48, Gemm64, Gemm64, Gemm, [48, 1, 4]),
            (64, Gemm64, Gemm64, Gemm, [48, 1, 4]),
            (96, Gemm128, Gemm128, Gemm, [48, 1, 2]),
        ] {
            let of = |form: Form| launched(&sizes(form), Extent::decode(rows)).launches[2].clone();
            let plain = of(Element::Bf16.into());
            assert_eq!((plain.kernel, plain.grid), (expect, grid), "{rows} rows");
            assert_eq!(of(Q8_0).kernel, expect_q8, "{rows} rows");
            assert_eq!(of(Element::F32.into()).kernel, expect_f32, "{rows} rows");
        }
        // Gate and up of 32 layers, and the head: enough columns for wide tiles.
        let at_32 = launched(&sizes(Element::Bf16), Extent::decode(32)).launches;
        let count = |kernel| at_32.iter().filter(|launch| launch.kernel == kernel).count();
        assert_eq!([Gemm64, Gemm32].map(count), [33, 3 * 32]);
        let names = |form: Form| Gemm16.entry(&sizes(form)) + " " + &Kernel::Embed.entry(&sizes(form));
        assert_eq!(names(Q8_0), "gemm_m16_q8_bf16 embed_bf16");
        assert_eq!(names(Element::Bf16.into()), "gemm_m16_bf16 embed_bf16");
        let tied = |form: Form| Sizes { spec: ModelSpec { tied: true, ..sizes(form).spec }, ..sizes(form) };
        assert_eq!(Kernel::Embed.entry(&tied(FP8)), "embed_fp8_f16");
    }

    #[test]
    fn grids_have_room_for_what_makes_a_device_busy() {
        let sizes = sizes(Element::Bf16);
        assert_eq!([1, 8, 64].map(|rows| sizes.most_splits(rows)), [34, 41, 97]);
        assert_eq!([1, 8, 128].map(|rows| sizes.best_parts(rows)), [64, 33, 3]);
    }

    /// Bytes of a matrix's numbers and of its scales, where it has some.
    fn matrix_spans(form: Form, n: u64, k: u64) -> Vec<u64> {
        match form.precision {
            Precision::F16 => vec![n * k * form.element.bytes() as u64],
            Precision::Q8_0 => vec![n * k, n * k / 16],
            Precision::Fp8 => vec![n * k, n * 4],
        }
    }

    /// The same of a product.
    fn product_spans(sizes: &Sizes, extent: Extent, launch: &Launch, args: &[Arg]) -> Vec<u64> {
        let size = sizes.form.element.bytes() as u64;
        let is_cut = launch.kernel.may_be_cut();
        let last = args.len() - if is_cut { 3 } else { 1 };
        let [k, n, epilogue] = [last - 2, last - 1, last].map(|i| match args[i] {
            Arg::U32(n) => u64::from(n),
            ref other => panic!("argument {i} of {:?} is {other:?}", launch.kernel),
        });
        let is_head = args[0] == Arg::At(Buffer::StepInputs, N_SAMPLED);
        let rows = if is_head { extent.sampled } else { extent.tokens } as u64;
        let y = match epilogue {
            0 => rows * n * size,
            3 | 4 => rows * n / 2 * size,
            _ => rows * n * 4,
        };
        let tiles = launch.grid.map(u64::from).iter().product::<u64>();
        let (columns, at_once, ..) = launch.kernel.block(1, sizes.form);
        let cut = match is_cut && launch.grid[2] > 1 {
            true => vec![0, 0, 0, tiles * (4 * columns * at_once) as u64, tiles * 8 * 4],
            false => Vec::new(),
        };
        [vec![4], matrix_spans(sizes.form, n, k), vec![rows * k * size, 0, y], cut].concat()
    }

    /// The same of the kernels of experts.
    fn expert_spans(sizes: &Sizes, tokens: u64, launch: &Launch, args: &[Arg]) -> Vec<u64> {
        let experts = sizes.spec.experts.as_ref().expect("they are for experts");
        let (count, hidden, size) = (experts.count as u64, sizes.spec.hidden as u64, sizes.form.element.bytes() as u64);
        let rows = tokens * experts.per_token as u64;
        let tiles = |tile_rows: u64| 4 + 12 * ((rows + count.min(rows) * (tile_rows - 1)) / tile_rows);
        match launch.kernel {
            Kernel::RouterLogits => vec![4, 4 * count * hidden, tokens * hidden * size, 4 * tokens * count],
            Kernel::ChooseExperts => {
                let Arg::U32(tile_rows) = args[9] else { panic!("{args:?}") };
                vec![4, 4 * tokens * count, tiles(tile_rows.into()), 4 * rows, 4 * rows, 4 * rows, 0, 0, 0, 0, 4]
            }
            Kernel::AddExperts => vec![4, 4 * rows * hidden, 4 * rows, 4 * rows, 4 * tokens * hidden],
            _ => {
                let [Arg::U32(k), Arg::U32(n), Arg::U32(epilogue)] = args[args.len() - 3..] else { panic!("{args:?}") };
                let (k, n) = (u64::from(k), u64::from(n));
                let is_up = epilogue >= 3;
                let (x, y) =
                    if is_up { (tokens * k * size, rows * n / 2 * size) } else { (rows * k * size, 4 * rows * n) };
                let tile_rows = if launch.kernel == Kernel::Experts8 { 8 } else { 64 };
                [vec![tiles(tile_rows)], matrix_spans(sizes.form, count * n, k), vec![4 * rows, x, y]].concat()
            }
        }
    }

    /// What a kernel reads or writes at most through its arguments, so that no launch can reach beyond a buffer.
    fn spans(sizes: &Sizes, extent: Extent, launch: &Launch, args: &[Arg]) -> Vec<(Arg, u64)> {
        let size = sizes.form.element.bytes() as u64;
        let u32_at = |i: usize| match args[i] {
            Arg::U32(n) => u64::from(n),
            ref other => panic!("argument {i} of {:?} is {other:?}", launch.kernel),
        };
        let [tokens, rows, sampled] = [extent.tokens, extent.rows, extent.sampled].map(|n| n as u64);
        let (spec, q_dim) = (&sizes.spec, sizes.spec.q_dim() as u64);
        let qkv = tokens * (spec.q_dim() + 2 * spec.kv_dim()) as u64 * size;
        let tables = rows * sizes.max_blocks() as u64 * 4;
        let pages = (sizes.config.n_blocks as u64 - 1) * sizes.page_bytes() + sizes.layer_elements() * size;
        let logits = 4 * sampled * spec.vocab as u64;
        let lengths: Vec<u64> = match launch.kernel {
            Kernel::Embed => {
                let hidden = u32_at(args.len() - 2);
                let table = match spec.tied {
                    true => matrix_spans(sizes.form, spec.vocab as u64, hidden),
                    false => vec![spec.vocab as u64 * hidden * size],
                };
                [vec![4, 4 * tokens], table, vec![4 * tokens * hidden]].concat()
            }
            Kernel::RmsNorm => {
                let (hidden, out) = (u32_at(5), u64::from(launch.grid[0]));
                vec![4, 4 * tokens * hidden, 4 * out, hidden * size, out * hidden * size]
            }
            Kernel::NormAdd => {
                let hidden = u32_at(4);
                vec![4, 4 * tokens * hidden, tokens * hidden * size, hidden * size]
            }
            Kernel::RopeStore => {
                let rope = sizes.config.context_tokens as u64 * u32_at(7) * 4;
                vec![4, qkv, 4 * tokens, 4 * tokens, tables, 0, rope, 0, 0, 0, 0, 0, pages]
            }
            Kernel::CapLogits => vec![4, 4 * sampled * u32_at(2)],
            Kernel::DecodeAttention => {
                let (splits, out) = (u64::from(launch.grid[1]), tokens * q_dim * size);
                // That no more of them are joined is asserted where they are made.
                let warps = 4 * u64::from(launch.grid[0]) * splits.min(sizes.most_joined_splits() as u64);
                let parts = warps * sizes.attention_part_bytes();
                vec![4, 32 * splits, qkv, pages, 0, tables, 0, out, parts, 4 * warps]
            }
            Kernel::PrefillAttention => {
                let tiles = 8 * extent.tiles as u64;
                vec![4, tiles, qkv, pages, 0, tables, 0, 4 * (rows + 1), 4 * rows, tokens * q_dim * size]
            }
            Kernel::Gated => {
                let (live, ffn) = (u64::from(launch.grid[1]), u32_at(4));
                vec![4, live * 2 * ffn * size, (u32_at(3) + live) * ffn * size]
            }
            Kernel::LibraryGemm => {
                let Arg::At(Buffer::Layer(_, part), 0) = args[2] else { panic!("of no layer: {args:?}") };
                let Gemm { k, n, output, .. } = gemm_of(sizes, part).expect("it was asked for");
                let (rows, k, n) = (u32_at(1), k as u64, n as u64);
                let y = rows * n * if output == GemmOutput::Store { size } else { 4 };
                let Arg::U64(beside) = args[6] else { panic!("no size: {args:?}") };
                vec![0, 0, n * k * size, rows * k * size, y, beside]
            }
            Kernel::SampleRules => vec![4, 96 * sampled, logits, 0, 4 * sampled, logits],
            Kernel::TakeSampled => vec![4, 4 * rows, 4 * rows, 4 * rows],
            Kernel::ArgmaxParts => vec![4, logits, 8 * sampled * u64::from(launch.grid[0])],
            Kernel::SampleChoose => {
                let parts = 8 * sampled * u32_at(4);
                vec![4, 96 * sampled, logits, parts, 0, 4 * sampled, 168 * sampled]
            }
            kernel if kernel.is_of_experts() => expert_spans(sizes, tokens, launch, args),
            _ => product_spans(sizes, extent, launch, args),
        };
        args.iter().copied().zip(lengths).collect()
    }

    #[test]
    fn no_launch_reaches_beyond_a_buffer() {
        let tied = |mut sizes: Sizes| {
            sizes.spec.tied = true;
            sizes
        };
        let plain = Element::ALL.map(sizes);
        let by_library = |sizes: Sizes| Sizes { choices: GemmChoices::of_all(2_048), ..sizes };
        let more = [sizes(Q8_0), sizes(FP8), tied(sizes(Q8_0)), tied(sizes(FP8)), gemma()];
        let forms: [Form; 4] = [Element::F32.into(), Element::Bf16.into(), Q8_0, FP8];
        let with_experts = forms.map(qwen3_moe);
        let more = more.into_iter().chain(with_experts).chain([by_library(sizes(Element::Bf16)), by_library(gemma())]);
        for sizes in plain.into_iter().chain(more) {
            let pieces = sizes.pieces();
            let beside = [mixed(3, 700), sizes.largest()];
            let extents = [1, 2, 24, 48, 128].map(Extent::decode).into_iter().chain(beside);
            for extent in extents {
                let plan = launched(&sizes, extent);
                for launch in &plan.launches {
                    assert!(launch.kernel.exists(sizes.form), "{launch:?}");
                    for (arg, length) in spans(&sizes, extent, launch, plan.args_of(launch)) {
                        let Arg::At(buffer, offset) = arg else { continue };
                        let piece: &Piece = pieces.iter().find(|p| p.buffer == buffer).expect("it is allocated");
                        assert!(offset + length <= piece.bytes, "{launch:?}: {length} from {offset} of {piece:?}");
                        let aligned = offset % 16 == 0 || length == 4;
                        assert!(aligned, "{launch:?}: {buffer:?} at {offset}");
                    }
                }
            }
        }
    }

    #[test]
    fn routes_do_not_lie_upon_each_other() {
        for (tokens, count, per_token) in [(2_048, 128, 8), (1, 4, 1), (8_192, 8, 2), (3, 512, 32)] {
            let mut sizes = qwen3_moe(Element::Bf16);
            sizes.config.max_step_tokens = tokens;
            let experts = sizes.spec.experts.as_mut().expect("it has some");
            (experts.count, experts.per_token) = (count, per_token);
            let routes = sizes.routes(sizes.spec.experts.as_ref().expect("it has some"));
            let of = |extent: Extent| {
                let plan = launched(&sizes, extent);
                let tiles =
                    plan.launches.iter().filter(|launch| matches!(launch.kernel, Kernel::Experts8 | Kernel::Experts64));
                tiles.map(|launch| u64::from(launch.grid[1])).max().unwrap_or(0)
            };
            let most = (1..=tokens).step_by(7).chain([tokens]).map(|tokens| of(mixed(1, tokens))).max().unwrap_or(0);
            assert!(4 + 12 * most <= routes.tokens, "{most} tiles before {routes:?}");
            let rows = 4 * (tokens * per_token) as u64;
            let next = [routes.tokens, routes.places, routes.shares, routes.bytes];
            assert!(next.is_sorted_by(|a, b| a + rows <= *b), "{routes:?}");
        }
    }

    #[test]
    fn footprints_are_those_of_the_buffers() {
        let sizes = sizes(Element::Bf16);
        let footprint = sizes.footprint();
        // 8.03e9 numbers of two bytes, and 4 MiB of rotations.
        assert_eq!(footprint.weights, 2 * 8_030_261_248 + (8_192 * 128 * 4));
        assert_eq!(footprint.block_bytes, 2 * 32 * 1_024 * 16 * 2);
        let of = |owner| sizes.pieces().iter().filter(|p| p.owner == owner).map(|p| p.bytes).sum::<u64>();
        use crate::backend::cuda::layout::Owner;
        assert_eq!(of(Owner::Kv), 2_048 * footprint.block_bytes);
        assert!(footprint.workspace >= of(Owner::Workspace) && footprint.workspace < of(Owner::Workspace) + 16 * 256);
        assert_eq!(footprint.graphs % GRAPH_NODE_BYTES, 0);
        // All but the embedding and 65 norms: 34 bytes for 32 numbers, or one for each and four for each row.
        let (matrices, rest) = (7_504_658_432, 2 * (525_336_576 + 65 * 4_096) + (8_192 * 128 * 4));
        assert_eq!(super::tests::sizes(Q8_0).footprint().weights, matrices / 32 * 34 + rest);
        let rows = 128_256 + 32 * (6_144 + 4_096 + 28_672 + 4_096);
        assert_eq!(super::tests::sizes(FP8).footprint().weights, matrices + 4 * rows + rest);
    }

    use crate::backend::cuda::vram::GRAPH_NODE_BYTES;
}
