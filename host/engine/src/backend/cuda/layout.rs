//! What lies where on a device: every buffer of a model and of its largest step, by name and size.
//!
//! One list, from which the planner counts, the arena allocates and the launch plan takes its arguments: sizes that are
//! written down twice come apart. Nothing here depends on a step; nothing is allocated after the start.

use super::bucket::Buckets;
use super::element::{Element, Form};
use super::launch::{Extent, Kernel, LaunchPlan};
use super::splits::SPLIT_WORDS;
use super::tune::GemmChoices;
use super::vram::{Footprint, GRAPH_NODE_BYTES};
use crate::backend::EngineConfig;
use crate::spec::{ModelSpec, Rope};

/// Buffers begin at multiples of this: more than any load of a kernel asks for.
pub(crate) const ALIGN: u64 = 256;

/// Bytes of a row's rules, of a best logit and of a row's log-probabilities, as the kernels have them.
pub(crate) const RULES_BYTES: u64 = 96;
pub(crate) const BEST_BYTES: u64 = 8;
pub(crate) const TOP_BYTES: u64 = 168;

/// Most entries of a request's own bias, of a policy's bias and of a row's bans that the device has room for.
pub(crate) const MAX_REQUEST_BIASES: usize = 1_024;
pub(crate) const MAX_POLICY_BIASES: usize = 8_192;
pub(crate) const MAX_BANS: usize = 512;

/// Most parts of a row in which the largest logit is looked for.
const MAX_BEST_PARTS: u64 = 64;

/// Most runs into which a product is cut, and the fewest tiles of k that one has.
pub(crate) const MAX_RUNS: usize = 8;
const LEAST_RUN: usize = 16;

/// Bytes of the sums of the largest tile, and warps that have them.
pub(crate) const PARTS_BYTES: u64 = 4 * 128 * 128;
pub(crate) const WARPS: u64 = 8;

/// Most rows of gate and up that stand beside each other before they are gated.
const MOST_GATED_ROWS: usize = 1_024;

/// Most bytes that a library may write beside a product's matrices: what NVIDIA advises for the architectures of today.
const MOST_GEMM_WORKSPACE: u64 = 32 << 20;

/// A piece of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Buffer {
    Embedding,
    /// Absent where the embedding serves.
    Head,
    FinalNorm,
    Rope,
    /// Of layers with a window, where they turn by another.
    WindowRope,
    Layer(u16, LayerPart),
    Kv,
    /// The residual stream, in `f32`.
    Residual,
    Normed,
    Qkv,
    Mixed,
    Ffn,
    /// Results of splits that are joined, and how many warps have brought theirs: zero between launches. Kernels that choose experts count
    /// there, too.
    AttentionParts,
    AttentionCounts,
    /// Sums of products that are cut into runs, and how many warps have brought theirs: zero between launches.
    ProductParts,
    ProductCounts,
    /// Of models with experts: the router's logits in `f32`, which experts tokens go through, and what those make of them, in `f32`.
    RouterLogits,
    Routes,
    ExpertOut,
    /// Gate and up in pairs, where a library computes them, and what a library writes beside a product.
    GateUp,
    GemmWorkspace,
    Logits,
    Best,
    /// Counts of tokens, zero between steps.
    Seen,
    StepInputs,
    Rules,
    Outputs,
}

/// A weight of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerPart {
    AttentionNorm,
    Qkv,
    /// These three where the model has them.
    QkvBias,
    QNorm,
    KNorm,
    Out,
    /// Where the model has one.
    OutBias,
    /// Of the result of attention, and of the feed-forward half, where the model has them.
    PostAttentionNorm,
    FfnNorm,
    /// Of layers with experts, in `f32`; their matrices then stand one below the other.
    Router,
    GateUp,
    Down,
    PostFfnNorm,
}

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Weights,
    Kv,
    Workspace,
}

/// A buffer to allocate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) buffer: Buffer,
    pub(crate) owner: Owner,
    pub(crate) bytes: u64,
    /// Of these, numbers; the scales of a matrix in 8 bits follow.
    pub(crate) numbers: u64,
}

/// Everything that sizes and launches depend on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sizes {
    pub(crate) spec: ModelSpec,
    pub(crate) form: Form,
    pub(crate) config: EngineConfig,
    /// Multiprocessors of the device.
    pub(crate) n_sms: u32,
    /// Whether the device has a library of products.
    pub(crate) has_library: bool,
    /// Which of them it computes.
    pub(crate) choices: GemmChoices,
}

/// Where the parts of a step's inputs stand in their buffer; counts come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InputLayout {
    pub(crate) tokens: u64,
    pub(crate) positions: u64,
    pub(crate) row_of: u64,
    pub(crate) row_starts: u64,
    pub(crate) lens: u64,
    pub(crate) pick: u64,
    /// Of the rows of one token, for layers that see all and for those with a window.
    pub(crate) splits: u64,
    pub(crate) window_splits: u64,
    pub(crate) tiles: u64,
    /// Of a step that follows another, where each row's token stands among those that the other one samples.
    pub(crate) follows: u64,
    pub(crate) tables: u64,
    pub(crate) bytes: u64,
}

/// Offsets of the counts in a step's inputs.
pub(crate) const N_TOKENS: u64 = 0;
pub(crate) const N_ROWS: u64 = 4;
pub(crate) const N_SAMPLED: u64 = 8;
pub(crate) const N_TILES: u64 = 12;
pub(crate) const N_SPLITS: u64 = 16;
pub(crate) const N_WINDOW_SPLITS: u64 = 20;

/// How many counts there are.
pub(crate) const N_COUNTS: usize = 6;

/// Runs into which k of a product with so many tiles is cut, for at most so many blocks; each run has some work.
pub(crate) fn runs(blocks: u32, tiles: usize, k: usize) -> usize {
    (blocks as usize / tiles.max(1)).min(k / (64 * LEAST_RUN)).clamp(1, MAX_RUNS)
}

impl Buffer {
    const LAYER_PARTS: usize = 13;
    const OTHERS: usize = 26;

    /// A number below [`Buffer::count`].
    pub(crate) fn index(self) -> usize {
        match self {
            Self::Embedding => 0,
            Self::Head => 1,
            Self::FinalNorm => 2,
            Self::Rope => 3,
            Self::Kv => 4,
            Self::Residual => 5,
            Self::Normed => 6,
            Self::Qkv => 7,
            Self::Mixed => 8,
            Self::Ffn => 9,
            Self::AttentionParts => 10,
            Self::AttentionCounts => 11,
            Self::Logits => 12,
            Self::Best => 13,
            Self::Seen => 14,
            Self::StepInputs => 15,
            Self::Rules => 16,
            Self::Outputs => 17,
            Self::WindowRope => 18,
            Self::ProductParts => 19,
            Self::ProductCounts => 20,
            Self::GateUp => 21,
            Self::GemmWorkspace => 22,
            Self::RouterLogits => 23,
            Self::Routes => 24,
            Self::ExpertOut => 25,
            Self::Layer(layer, part) => Self::OTHERS + usize::from(layer) * Self::LAYER_PARTS + part as usize,
        }
    }

    pub(crate) fn count(layers: usize) -> usize {
        Self::OTHERS + layers * Self::LAYER_PARTS
    }
}

impl Piece {
    fn plain(buffer: Buffer, owner: Owner, bytes: u64) -> Self {
        Self { buffer, owner, bytes, numbers: bytes }
    }
}

impl Sizes {
    /// Every buffer, in the order in which it is allocated.
    pub(crate) fn pieces(&self) -> Vec<Piece> {
        let mut pieces = self.weights();
        pieces.push(Piece::plain(Buffer::Kv, Owner::Kv, self.config.n_blocks as u64 * self.page_bytes()));
        pieces.extend(self.workspace());
        pieces
    }

    fn weights(&self) -> Vec<Piece> {
        let ModelSpec { vocab, hidden, layers, tied, head_dim, ref rope, ref window_rope, .. } = self.spec;
        let (q_dim, kv_dim) = (self.spec.q_dim(), self.spec.kv_dim());
        let vector = |n: usize| ((n * self.form.element.bytes()) as u64, 0);
        let matrix = |rows, k| (self.form.numbers_bytes(rows, k), self.form.scales_bytes(rows, k));
        let piece = |buffer, (numbers, scales)| {
            let owner = Owner::Weights;
            Piece { buffer, owner, bytes: numbers + scales, numbers }
        };
        let turns = |rope: &Rope| ((self.config.context_tokens * rope.width * size_of::<f32>()) as u64, 0);
        let mut pieces = vec![
            // One that is not the head, too, is read a row at a time: it stays as it is.
            piece(Buffer::Embedding, if tied { matrix(vocab, hidden) } else { vector(vocab * hidden) }),
            piece(Buffer::FinalNorm, vector(hidden)),
            piece(Buffer::Rope, turns(rope)),
        ];
        pieces.extend(window_rope.as_ref().map(|rope| piece(Buffer::WindowRope, turns(rope))));
        if !tied {
            pieces.push(piece(Buffer::Head, matrix(vocab, hidden)));
        }
        for layer in 0..layers {
            let (ffn, halves, experts) = (self.ffn_of(layer), self.halves_of(layer), self.experts_of(layer));
            let parts = [
                (LayerPart::AttentionNorm, vector(hidden)),
                (LayerPart::Qkv, matrix(q_dim + 2 * kv_dim, hidden)),
                (LayerPart::QkvBias, vector(q_dim + 2 * kv_dim)),
                (LayerPart::QNorm, vector(head_dim)),
                (LayerPart::KNorm, vector(head_dim)),
                (LayerPart::Out, matrix(hidden, q_dim)),
                (LayerPart::OutBias, vector(hidden)),
                (LayerPart::PostAttentionNorm, vector(hidden)),
                (LayerPart::FfnNorm, vector(hidden)),
                (LayerPart::Router, ((halves * hidden * size_of::<f32>()) as u64, 0)),
                (LayerPart::GateUp, matrix(halves * 2 * ffn, hidden)),
                (LayerPart::Down, matrix(halves * hidden, ffn)),
                (LayerPart::PostFfnNorm, vector(hidden)),
            ];
            let has = |part| self.has(part) && (part != LayerPart::Router || experts.is_some());
            let here = parts.into_iter().filter(|(part, _)| has(*part));
            pieces.extend(here.map(|(part, bytes)| piece(Buffer::Layer(layer as u16, part), bytes)));
        }
        pieces
    }

    fn workspace(&self) -> Vec<Piece> {
        let (spec, config) = (&self.spec, &self.config);
        let (tokens, rows, size) = (config.max_step_tokens, config.max_rows, self.form.element.bytes());
        let most = tokens.max(rows);
        let piece = |buffer, bytes: u64| Piece::plain(buffer, Owner::Workspace, bytes);
        let typed = |buffer, n: usize| piece(buffer, (n * size) as u64);
        // Of the four warps of each block.
        let joined = (4 * self.most_joined_splits() * self.clusters()) as u64;
        // For one block of the larger tiles on each multiprocessor, or two of half the size.
        let run_tiles = if self.form.element == Element::F32 { 0 } else { self.n_sms.into() };
        let gated_rows = if spec.experts.is_some() { 0 } else { tokens.min(MOST_GATED_ROWS) };
        let library = [
            typed(Buffer::GateUp, gated_rows * 2 * spec.ffn),
            piece(Buffer::GemmWorkspace, self.gemm_workspace_bytes()),
        ];
        let library = library.into_iter().filter(|_| self.may_use_library());
        let routed = spec.experts.iter().flat_map(|experts| {
            [
                piece(Buffer::RouterLogits, (tokens * experts.count * 4) as u64),
                piece(Buffer::Routes, self.routes(experts).bytes),
                piece(Buffer::ExpertOut, (tokens * experts.per_token * spec.hidden * 4) as u64),
            ]
        });
        let always = [
            piece(Buffer::Residual, (tokens * spec.hidden * 4) as u64),
            typed(Buffer::Normed, most * spec.hidden),
            typed(Buffer::Qkv, tokens * (spec.q_dim() + 2 * spec.kv_dim())),
            typed(Buffer::Mixed, tokens * spec.q_dim()),
            typed(Buffer::Ffn, self.most_ffn(tokens)),
            piece(Buffer::AttentionParts, joined * self.attention_part_bytes()),
            piece(Buffer::AttentionCounts, joined * 4),
            piece(Buffer::ProductParts, run_tiles * PARTS_BYTES),
            piece(Buffer::ProductCounts, 2 * run_tiles * WARPS * 4),
            piece(Buffer::Logits, (rows * spec.vocab * 4) as u64),
            piece(Buffer::Best, rows as u64 * MAX_BEST_PARTS * BEST_BYTES),
            piece(Buffer::Seen, (rows * spec.vocab * 4) as u64),
            piece(Buffer::StepInputs, self.inputs(self.largest()).bytes),
            piece(Buffer::Rules, self.rules_bytes()),
            piece(Buffer::Outputs, self.outputs_bytes(rows as u64)),
        ];
        always.into_iter().chain(routed).chain(library).collect()
    }

    /// Whether a library may compute products: of plain numbers, in steps that are long enough.
    pub(crate) fn may_use_library(&self) -> bool {
        let is_long = self.config.max_step_tokens >= GemmChoices::LEAST_ROWS;
        self.has_library && self.form.suffix().is_none() && is_long
    }

    /// Rows, of so many that are left of a product, that a library computes at once: of gate and up fewer, for they stand somewhere before
    /// they are gated. Parts are about as long as each other, since each reads the whole weight.
    pub(crate) fn rows_at_once(&self, part: LayerPart, rows: usize) -> usize {
        let most = if part == LayerPart::GateUp { MOST_GATED_ROWS } else { GemmChoices::MOST_ROWS };
        rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(128).min(rows)
    }

    /// Bytes that a library may write beside a product's matrices: room for a few runs of the widest one.
    pub(crate) fn gemm_workspace_bytes(&self) -> u64 {
        let ModelSpec { ffn, hidden, .. } = self.spec;
        let widest = (2 * ffn).max(hidden).max(self.spec.q_dim() + 2 * self.spec.kv_dim());
        MOST_GEMM_WORKSPACE.min((4 * 4 * self.config.max_step_tokens * widest) as u64)
    }

    /// Whether the model has this part.
    pub(crate) fn has(&self, part: LayerPart) -> bool {
        match part {
            LayerPart::QkvBias => self.spec.qkv_bias,
            LayerPart::OutBias => self.spec.out_bias,
            LayerPart::QNorm | LayerPart::KNorm => self.spec.qk_norm,
            LayerPart::PostAttentionNorm | LayerPart::PostFfnNorm => self.spec.post_norms,
            _ => true,
        }
    }

    /// The largest step.
    pub(crate) fn largest(&self) -> Extent {
        let EngineConfig { max_step_tokens: tokens, max_rows: rows, .. } = self.config;
        Extent { rows, tokens, sampled: rows, singles: rows, tiles: tokens.div_ceil(self.tile_tokens()) + rows }
    }

    /// Query heads per key head.
    pub(crate) fn group(&self) -> usize {
        self.spec.heads / self.spec.kv_heads
    }

    /// Query heads that a block of decode attention takes at most, so that keys are read once for all of them.
    pub(crate) fn cluster_heads(&self) -> usize {
        // As many columns as matrix units have; without them, a warp each.
        if self.form.element == Element::F32 { 4 } else { 8 }
    }

    /// Blocks of decode attention for a row that is not cut.
    pub(crate) fn clusters(&self) -> usize {
        self.spec.kv_heads * self.group().div_ceil(self.cluster_heads())
    }

    /// Bytes that a warp brings of a split that is joined: for each lane's four elements of heads those, and their maxima and sums.
    pub(super) fn attention_part_bytes(&self) -> u64 {
        let quads = (self.cluster_heads() * self.spec.head_dim).div_ceil(512);
        (quads * (32 + 2) * 16) as u64
    }

    /// Tokens that a tile of prefill attention holds.
    pub(crate) fn tile_tokens(&self) -> usize {
        64 / self.group()
    }

    /// Pages of the longest sequence.
    pub(crate) fn max_blocks(&self) -> usize {
        self.config.context_tokens.div_ceil(self.config.block_tokens)
    }

    /// Numbers of a page in one layer: keys and values.
    pub(crate) fn layer_elements(&self) -> u64 {
        (2 * self.spec.kv_dim() * self.config.block_tokens) as u64
    }

    /// Numbers of a page.
    pub(crate) fn page_elements(&self) -> u64 {
        self.layer_elements() * self.spec.layers as u64
    }

    pub(crate) fn page_bytes(&self) -> u64 {
        self.page_elements() * self.form.element.bytes() as u64
    }

    /// Words of a token mask.
    pub(crate) fn mask_words(&self) -> usize {
        self.spec.vocab.div_ceil(32)
    }

    /// Parts in which the largest of a row's logits is looked for.
    pub(crate) fn best_parts(&self, rows: usize) -> u64 {
        let wanted = (2 * u64::from(self.n_sms)).div_ceil(rows.max(1) as u64);
        wanted.min((self.spec.vocab as u64).div_ceil(1_024)).clamp(1, MAX_BEST_PARTS)
    }

    pub(crate) fn inputs(&self, extent: Extent) -> InputLayout {
        let Extent { rows, tokens, sampled, singles, tiles } = extent;
        let splits = SPLIT_WORDS * self.most_splits(singles);
        let mut next = (4 * N_COUNTS as u64).next_multiple_of(16);
        let mut place = |words: usize| {
            let at = next;
            next += (4 * words as u64).next_multiple_of(16);
            at
        };
        InputLayout {
            tokens: place(tokens),
            positions: place(tokens),
            row_of: place(tokens),
            row_starts: place(rows + 1),
            lens: place(rows),
            pick: place(sampled),
            splits: place(splits),
            window_splits: place(if self.spec.window.is_some() { splits } else { 0 }),
            tiles: place(2 * tiles),
            follows: place(rows),
            tables: place(rows * self.max_blocks()),
            bytes: next,
        }
    }

    /// Where the lists that rules point into begin, for `rows` sampled rows.
    pub(crate) fn lists_at(&self, rows: u64) -> u64 {
        (rows * RULES_BYTES).next_multiple_of(16)
    }

    /// Rules of every row, each with a mask, a whole history and the longest lists.
    fn rules_bytes(&self) -> u64 {
        let words = self.mask_words() + self.config.context_tokens + MAX_BANS;
        let lists = 4 * words + 8 * (MAX_REQUEST_BIASES + MAX_POLICY_BIASES + 1);
        let rows = self.config.max_rows as u64;
        self.lists_at(rows) + rows * lists as u64
    }

    /// Where log-probabilities begin in the outputs; tokens come first.
    pub(crate) fn tops_at(rows: u64) -> u64 {
        (4 * rows).next_multiple_of(16)
    }

    fn outputs_bytes(&self, rows: u64) -> u64 {
        Self::tops_at(rows) + rows * TOP_BYTES
    }

    /// Launches of all graphs together.
    fn graph_nodes(&self) -> u64 {
        let mut plan = LaunchPlan::default();
        let mut nodes = 0;
        for rows in Buckets::up_to(self.config.max_rows).largest_first() {
            plan.clear();
            plan.forward(self, Extent::decode(rows));
            plan.choose(self, rows);
            nodes += plan.launches.len() as u64;
        }
        nodes
    }

    /// What it needs, whatever the device has.
    pub(crate) fn footprint(&self) -> Footprint {
        let sum = |pieces: Vec<Piece>| pieces.iter().map(|piece| piece.bytes.next_multiple_of(ALIGN)).sum();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Footprint {
            form: self.form,
            weights: sum(self.weights()),
            workspace: sum(self.workspace()),
            graphs: self.graph_nodes() * GRAPH_NODE_BYTES,
            block_bytes: self.page_bytes(),
            block_tokens: count(self.config.block_tokens),
            context_tokens: count(self.config.context_tokens),
            max_rows: count(self.config.max_rows),
        }
    }

    /// The kernels that this model needs, by their entry points.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (Kernel, String)> + '_ {
        let is_routed = self.spec.experts.is_some();
        let is_here = move |kernel: &Kernel| kernel.exists(self.form) && (is_routed || !kernel.is_of_experts());
        let here = Kernel::ALL.into_iter().filter(is_here);
        here.map(|kernel| (kernel, kernel.entry(self)))
    }
}
