//! Launches of a layer with sparse experts: each token goes through the few feed-forward halves that its router prefers.
//!
//! What a token prefers is known on the device alone, so grids have room for whatever it may be: a list of tiles, made by the kernel that
//! chooses, says which rows of which expert a block computes, and blocks past its end do nothing. Rows of an expert stand side by side, so
//! that its weights are read once for all of them.

use super::{Arg, Epilogue, Extent, Kernel, LaunchPlan, gating, scales, u32_arg};
use crate::backend::cuda::element::Form;
use crate::backend::cuda::layout::{Buffer, LayerPart, N_TOKENS, Sizes};
use crate::spec::{Experts, ModelSpec};

/// Where the parts of [`Buffer::Routes`] begin: the list of tiles is first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RouteLayout {
    /// Of each row of an expert its token.
    pub(crate) tokens: u64,
    /// Of each expert of a token its row.
    pub(crate) places: u64,
    /// The same experts' parts in the token's result.
    pub(crate) shares: u64,
    pub(crate) bytes: u64,
}

/// A product of all experts: rows go through the matrix of the expert that they were given to.
struct ExpertProduct {
    kernel: Kernel,
    part: LayerPart,
    /// Of the rows of x, where they are not as they stand.
    numbers: Arg,
    x: Buffer,
    y: Buffer,
    k: usize,
    /// Of one expert.
    n: usize,
    epilogue: Epilogue,
}

// === impl Kernel ===

impl Kernel {
    /// Whether only models with experts need it.
    pub(crate) fn is_of_experts(self) -> bool {
        matches!(self, Self::RouterLogits | Self::ChooseExperts | Self::Experts8 | Self::Experts64 | Self::AddExperts)
    }

    /// The one for the products of so many rows of all experts: while an expert has few of them, reading its weight is what takes time.
    fn of_experts(rows: usize, count: usize, form: Form) -> Self {
        if rows <= 8 * count && Self::Experts8.exists(form) { Self::Experts8 } else { Self::Experts64 }
    }

    /// Rows and columns of a tile, and threads.
    fn expert_tile(self) -> (usize, usize, u32) {
        if self == Self::Experts8 { (8, 32, 256) } else { (64, 64, 128) }
    }
}

// === impl Sizes ===

/// Most tiles of so many rows that as many rows of so many experts may make.
fn most_tiles(rows: usize, count: usize, tile_rows: usize) -> usize {
    (rows + count.min(rows) * (tile_rows - 1)) / tile_rows
}

impl Sizes {
    /// The experts of a layer that has them.
    pub(crate) fn experts_of(&self, layer: usize) -> Option<&Experts> {
        self.spec.experts.as_ref().filter(|experts| experts.dense[layer].is_none())
    }

    /// The width of a layer's feed-forward half; of one of them where it has several.
    pub(crate) fn ffn_of(&self, layer: usize) -> usize {
        let dense = self.spec.experts.as_ref().and_then(|experts| experts.dense[layer]);
        dense.unwrap_or(self.spec.ffn)
    }

    /// How many feed-forward halves a layer has.
    pub(crate) fn halves_of(&self, layer: usize) -> usize {
        self.experts_of(layer).map_or(1, |experts| experts.count)
    }

    /// Numbers that stand between the two products of a feed-forward half, of so many tokens.
    pub(crate) fn most_ffn(&self, tokens: usize) -> usize {
        let of = |layer| self.ffn_of(layer) * self.experts_of(layer).map_or(1, |experts| experts.per_token);
        tokens * (0..self.spec.layers).map(of).max().unwrap_or(0)
    }

    /// The routes of the largest step.
    pub(crate) fn routes(&self, experts: &Experts) -> RouteLayout {
        let rows = self.config.max_step_tokens * experts.per_token;
        // Of the smaller tiles there are never more than two an expert: more rows make larger ones.
        let tiles = rows / 64 + 2 * experts.count;
        let mut next = (4 + 12 * tiles as u64).next_multiple_of(16);
        let mut place = || {
            let at = next;
            next += (4 * rows as u64).next_multiple_of(16);
            at
        };
        RouteLayout { tokens: place(), places: place(), shares: place(), bytes: next }
    }
}

// === impl LaunchPlan ===

impl LaunchPlan {
    /// From the normed rows of a layer, through its experts, to the residual stream.
    pub(super) fn experts(&mut self, sizes: &Sizes, extent: Extent, layer: usize, experts: &Experts) {
        let &Experts { count, per_token, normalised, .. } = experts;
        let (tokens, hidden, routes) = (extent.tokens, sizes.spec.hidden, sizes.routes(experts));
        let kernel = Kernel::of_experts(tokens * per_token, count, sizes.form);
        let n = Arg::At(Buffer::StepInputs, N_TOKENS);
        let route = |at| Arg::At(Buffer::Routes, at);
        let logits = Arg::At(Buffer::RouterLogits, 0);
        let (places, shares) = (route(routes.places), route(routes.shares));

        let router = Arg::At(Buffer::Layer(layer as u16, LayerPart::Router), 0);
        let from = [n, router, Arg::At(Buffer::Normed, 0), logits];
        let grid = [count.div_ceil(8), tokens.div_ceil(8), 1];
        self.push(Kernel::RouterLogits, grid, 128, from.into_iter().chain([u32_arg(hidden), u32_arg(count)]));

        let to = [route(0), route(routes.tokens), places, shares];
        let how = [count, per_token, normalised.into(), kernel.expert_tile().0].map(u32_arg);
        let args = [n, logits].into_iter().chain(to).chain(how).chain([Arg::At(Buffer::AttentionCounts, 0)]);
        self.push(Kernel::ChooseExperts, [tokens.div_ceil(16), 1, 1], 512, args);

        let [up, down] = ExpertProduct::both(sizes, kernel, route(routes.tokens));
        let most_tiles = most_tiles(tokens * per_token, count, kernel.expert_tile().0);
        self.expert_product(sizes, layer, most_tiles, &up);
        self.expert_product(sizes, layer, most_tiles, &down);

        let from = [n, Arg::At(Buffer::ExpertOut, 0), places, shares, Arg::At(Buffer::Residual, 0)];
        let of = [u32_arg(hidden), u32_arg(per_token)];
        self.push(Kernel::AddExperts, [tokens, hidden.div_ceil(256), 1], 256, from.into_iter().chain(of));
    }

    fn expert_product(&mut self, sizes: &Sizes, layer: usize, most_tiles: usize, product: &ExpertProduct) {
        let ExpertProduct { kernel, part, numbers, x, y, k, n, epilogue } = *product;
        let (_, columns, block) = kernel.expert_tile();
        let weight = Buffer::Layer(layer as u16, part);
        let from = [Arg::At(Buffer::Routes, 0), Arg::At(weight, 0)].into_iter();
        let scales = scales(sizes, weight, sizes.halves_of(layer) * n, k);
        let to = [numbers, Arg::At(x, 0), Arg::At(y, 0), u32_arg(k), u32_arg(n), Arg::U32(epilogue as u32)];
        self.push(kernel, [n.div_ceil(columns), most_tiles, 1], block, from.chain(scales).chain(to));
    }
}

// === impl ExpertProduct ===

impl ExpertProduct {
    /// Gate and up, of the tokens that chose an expert, and down.
    fn both(sizes: &Sizes, kernel: Kernel, tokens: Arg) -> [Self; 2] {
        let ModelSpec { hidden, ffn, .. } = sizes.spec;
        let up = Self {
            kernel,
            part: LayerPart::GateUp,
            numbers: tokens,
            x: Buffer::Normed,
            y: Buffer::Ffn,
            k: hidden,
            n: 2 * ffn,
            epilogue: gating(&sizes.spec),
        };
        let down = Self {
            kernel,
            part: LayerPart::Down,
            numbers: Arg::Null,
            x: Buffer::Ffn,
            y: Buffer::ExpertOut,
            k: ffn,
            n: hidden,
            epilogue: Epilogue::StoreF32,
        };
        [up, down]
    }
}
