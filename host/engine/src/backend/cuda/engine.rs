//! Computes step plans on a device: inputs in one copy or two, a graph, rules in another, a graph, tokens back in one copy.
//!
//! The host's part of a step is writing words into pinned memory. Edits of a sampler policy are asked for while the forward
//! pass runs, so a policy has that long. Everything is allocated when the engine is made; a step allocates nothing.
//!
//! A step can be begun behind one that is under way: it has pinned memory of its own, the stream keeps them in order, and what
//! one samples the other takes on the device. A fault that stays belongs to the step that is waited for when it shows.

use std::collections::VecDeque;
use std::sync::Arc;

use pointsman_sched::execute::{ExecuteError, Executor, InHalves, PoolSize, StepOutput, StepPlan};
use pointsman_sched::sampler::{Edit, EditSource};

use super::bucket::{Buckets, StepShape};
use super::device::{
    Device, DeviceError, DeviceLaunch, DeviceRoom, GemmAddresses, GemmId, GraphId, Lane, Rows, Turn, Value, in_turn,
};
use super::element::Form;
use super::launch::{Arg, Extent, Kernel, LaunchPlan};
use super::layout::{ALIGN, Buffer, N_COUNTS, Owner, Piece, Sizes};
use super::step::{check_follows, check_lists, extent_of, output_words, read_outputs, write_inputs, write_rules};
use super::tune::{GemmChoice, GemmChoices, LibraryUse, Tuner};
use super::vram::{Footprint, KvWish, VramError, VramPlan, VramUse, recommend};
use super::weights::{Packer, Source};

mod drafts;
mod score;

use crate::backend::cpu::{Precision, Progress};
use crate::backend::{ConfigError, EngineConfig};
use crate::load::LoadError;
use crate::spec::ModelSpec;

/// Widths of heads that attention is compiled for.
const WIDTHS: [usize; 5] = [32, 64, 96, 128, 256];

/// Steps that are under way at once.
const UNDER_WAY: usize = 2;

/// Most experts of a layer, those of them that a token goes through, and words, that the kernels have room for.
const MOST_EXPERTS: usize = 512;
const MOST_CHOSEN: usize = 32;
const MOST_TOKENS: usize = (1 << 20) - 1;

/// Most arguments of a kernel.
const MAX_ARGS: usize = 24;

/// Why a model cannot be served on a device.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A size is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The kernels do not cover this model. A retry does not help; the CPU serves it.
    #[error(
        "the CUDA kernels do not cover {what} ({found}); they cover {supported}. Serve this model with --device cpu"
    )]
    Unsupported {
        /// What the model has.
        what: &'static str,
        /// How much of it.
        found: String,
        /// What there is.
        supported: &'static str,
    },
    /// The weights cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The memory does not suffice.
    #[error(transparent)]
    Vram(#[from] VramError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// How an engine is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Type of activations and pages, and how weights are kept.
    pub form: Form,
    /// Capture the decode step of each bucket as a graph, where the device can.
    pub graphs: bool,
    /// Products of many rows by the device's library.
    pub library: LibraryUse,
}

/// Computes step plans on a device.
#[derive(Debug)]
pub struct CudaEngine {
    device: Box<dyn Device>,
    sizes: Sizes,
    buckets: Buckets,
    /// Of each buffer, by its index; 0 where there is none.
    addresses: Vec<u64>,
    /// Per bucket, by its rows.
    graphs: Vec<(usize, Captured)>,
    launches: LaunchPlan,
    edits: Vec<Option<Arc<Edit>>>,
    /// The last step that had drafts, without them.
    apart: StepPlan,
    /// Steps that are begun and not finished.
    begun: VecDeque<Begun>,
    /// What the last step launched.
    last: Option<(Extent, Option<Captured>)>,
    used: VramUse,
    /// The first fault after which nothing works.
    lost: Option<Arc<str>>,
    /// For the log.
    note: Option<String>,
}

/// A step that is under way.
#[derive(Clone, Copy, Debug)]
struct Begun {
    turn: Turn,
    /// Rows of the launch that chooses its tokens.
    rows: usize,
    /// Tokens that it samples and that a step behind it can take.
    n_sampled: usize,
    /// Whether prompts are to be scored from what it leaves behind.
    is_scored: bool,
}

/// A bucket's graphs: the forward pass and the choice of tokens.
#[derive(Clone, Copy, Debug)]
struct Captured {
    forward: GraphId,
    choose: GraphId,
}

// === impl CudaEngine ===

impl CudaEngine {
    /// Allocates everything, copies the weights and captures the graphs. `progress` is told the bytes of weights done, and
    /// ends it by a no.
    ///
    /// # Errors
    /// The model is not covered, the weights are bad, or the device refuses; what was allocated is given back.
    pub fn load(
        mut device: Box<dyn Device>,
        (spec, source): (ModelSpec, Source<'_>),
        config: EngineConfig,
        options: CudaOptions,
        progress: &mut Progress<'_>,
    ) -> Result<Self, CudaError> {
        config.check(&spec)?;
        check_spec(&spec)?;
        let (n_sms, has_library, choices) = (device.info().n_sms, device.has_library(), GemmChoices::default());
        let sizes = Sizes { spec, form: options.form, config, n_sms, has_library, choices };
        device.enter()?;
        let entries: Vec<(usize, String)> = sizes.entries().map(|(kernel, entry)| (kernel as usize, entry)).collect();
        device.load(&entries)?;
        let mut used = VramUse::default();
        let addresses = allocate(&mut *device, &sizes, &mut used)?;
        Packer::new(&sizes, &mut *device, &addresses).pack(source, progress)?;
        let rows = sizes.config.max_rows;
        let mut engine = Self {
            device,
            buckets: Buckets::up_to(rows),
            addresses,
            graphs: Vec::new(),
            launches: LaunchPlan::default(),
            edits: Vec::with_capacity(rows),
            apart: StepPlan::default(),
            begun: VecDeque::with_capacity(UNDER_WAY),
            last: None,
            used,
            lost: None,
            note: None,
            sizes,
        };
        engine.warm_up()?;
        engine.tune(options.library)?;
        if options.graphs && engine.device.captures() {
            engine.capture_or_launch()?;
        }
        Ok(engine)
    }

    /// Device memory by owner, as allocated.
    #[must_use]
    pub fn memory(&self) -> VramUse {
        self.used
    }

    /// The sizes it was made with.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.sizes.config
    }

    /// The model it computes.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        &self.sizes.spec
    }

    /// The type it computes in, and how its weights are kept.
    #[must_use]
    pub fn form(&self) -> Form {
        self.sizes.form
    }

    /// What computes the products of prompts, where the device has a library for them.
    #[must_use]
    pub fn gemm_choices(&self) -> &[GemmChoice] {
        self.sizes.choices.all()
    }

    /// Whether decode steps are graphs.
    #[must_use]
    pub fn has_graphs(&self) -> bool {
        !self.graphs.is_empty()
    }

    /// The device.
    pub fn device(&mut self) -> &mut dyn Device {
        &mut *self.device
    }

    /// Logits of the `i`-th sampling row of the last step, after its rules.
    ///
    /// # Errors
    /// The device's.
    pub fn logits(&mut self, i: usize) -> Result<Vec<f32>, DeviceError> {
        let vocab = self.sizes.spec.vocab;
        let mut words = vec![0; vocab];
        self.device.download(self.addresses[Buffer::Logits.index()] + (4 * i * vocab) as u64, &mut words)?;
        Ok(words.into_iter().map(f32::from_bits).collect())
    }

    /// Runs every launch once with counts of zero: the driver loads code lazily, and a capture must not be the first use.
    fn warm_up(&mut self) -> Result<(), DeviceError> {
        let lane = Lane::Inputs(Turn::default());
        self.device.lane(lane)[..N_COUNTS].fill(0);
        self.device.send(lane, self.addresses[Buffer::StepInputs.index()], N_COUNTS)?;
        for rows in Buckets::up_to(self.sizes.config.max_rows).largest_first() {
            self.launch_forward(Extent::decode(rows))?;
            self.launch_choose(rows)?;
        }
        self.launch_forward(self.sizes.largest())?;
        self.take_sampled(self.sizes.largest())?;
        self.device.wait()
    }

    /// Gives the device's library the products that it shall compute.
    fn tune(&mut self, how: LibraryUse) -> Result<(), DeviceError> {
        let Self { device, addresses, launches, sizes, .. } = self;
        let mut tuner = Tuner { device: &mut **device, addresses, launches, sizes: sizes.clone(), how, refused: None };
        sizes.choices = tuner.tune()?;
        let refused = tuner.refused.map(|why| format!("a product of long prompts stays with the kernels: {why}"));
        self.note = self.note.take().or(refused);
        Ok(())
    }

    /// Where the driver records nothing, each step launches its kernels one by one.
    fn capture_or_launch(&mut self) -> Result<(), DeviceError> {
        let Err(why) = self.capture() else { return Ok(()) };
        if why.is_lost() {
            return Err(why);
        }
        self.device.stop_overlap(&why);
        self.device.wait()?;
        // Those that were captured go with the device.
        self.graphs.clear();
        let note = format!("steps could not be captured as graphs, so their kernels are launched one by one: {why}");
        self.note = Some(self.note.take().map_or_else(|| note.clone(), |other| format!("{other}; {note}")));
        Ok(())
    }

    /// Records the decode step of every bucket, the largest first.
    fn capture(&mut self) -> Result<(), DeviceError> {
        let _nobody_waits = in_turn();
        let before = self.device.memory()?.free;
        for rows in Buckets::up_to(self.sizes.config.max_rows).largest_first() {
            let captured = match self.record(rows) {
                Err(error) if !error.is_lost() && self.device.stop_overlap(&error) => self.record(rows)?,
                captured => captured?,
            };
            self.graphs.push((rows, captured));
        }
        self.used.graphs = before.saturating_sub(self.device.memory()?.free);
        Ok(())
    }

    fn record(&mut self, rows: usize) -> Result<Captured, DeviceError> {
        self.device.begin_capture()?;
        self.launch_forward(Extent::decode(rows))?;
        let forward = self.device.end_capture()?;
        self.device.begin_capture()?;
        self.launch_choose(rows)?;
        let choose = self.device.end_capture()?;
        Ok(Captured { forward, choose })
    }

    fn launch_forward(&mut self, extent: Extent) -> Result<(), DeviceError> {
        self.launches.clear();
        self.launches.forward(&self.sizes, extent);
        launch_all(&mut *self.device, &self.addresses, &self.launches)
    }

    fn launch_choose(&mut self, rows: usize) -> Result<(), DeviceError> {
        self.launches.clear();
        self.launches.choose(&self.sizes, rows);
        launch_all(&mut *self.device, &self.addresses, &self.launches)
    }

    fn take_sampled(&mut self, extent: Extent) -> Result<(), DeviceError> {
        self.launches.clear();
        self.launches.take_sampled(&self.sizes, extent);
        launch_all(&mut *self.device, &self.addresses, &self.launches)
    }

    fn compute(&mut self, extent: Extent, graph: Option<Captured>) -> Result<(), DeviceError> {
        match graph {
            Some(Captured { forward, .. }) => self.device.replay(forward),
            None => match self.launch_forward(extent) {
                // Begun anew: nothing of a forward pass depends on what one before it left.
                Err(why @ DeviceError::Library { .. }) => {
                    self.sizes.choices = GemmChoices::default();
                    self.note = Some(format!("{why}; from now on the kernels compute all of a prompt"));
                    self.launch_forward(extent)
                }
                launched => launched,
            },
        }
    }

    fn choose(&mut self, extent: Extent, graph: Option<Captured>) -> Result<(), DeviceError> {
        match graph {
            Some(Captured { choose, .. }) => self.device.replay(choose),
            None => self.launch_choose(extent.sampled),
        }
    }

    /// Computes the last step again, so many times, and waits once: what the device takes for a step, without what the host does
    /// for it. For measurements; every result is written where it was. Does nothing before the first step.
    ///
    /// # Errors
    /// The device's.
    pub fn repeat_last(&mut self, times: usize) -> Result<(), DeviceError> {
        self.device.enter()?;
        for (extent, graph) in std::iter::repeat_n(self.last, times).flatten() {
            self.compute(extent, graph)?;
            if extent.sampled > 0 {
                self.choose(extent, graph)?;
            }
        }
        self.device.wait()
    }

    /// The step in the device's terms, in this turn; the rows of the launch that chooses its tokens.
    fn run(&mut self, plan: &StepPlan, edits: &mut dyn EditSource, turn: Turn) -> Result<usize, DeviceError> {
        if plan.rows.iter().all(|row| row.drafts == 0) {
            return self.run_apart((plan, plan), edits, turn);
        }
        let mut apart = std::mem::take(&mut self.apart);
        drafts::set_apart(plan, &mut apart);
        let ran = self.run_apart((plan, &apart), edits, turn);
        self.apart = apart;
        ran
    }

    /// The same of a step whose drafts are set apart.
    fn run_apart(
        &mut self,
        (of, plan): (&StepPlan, &StepPlan),
        edits: &mut dyn EditSource,
        turn: Turn,
    ) -> Result<usize, DeviceError> {
        self.device.enter()?;
        let (extent, graph) = match self.buckets.shape(plan) {
            StepShape::Decode { bucket } => {
                let graph = self.graphs.iter().find(|(rows, _)| *rows == bucket).map(|(_, captured)| *captured);
                (Extent::decode(bucket), graph)
            }
            StepShape::Mixed { .. } => (extent_of(&self.sizes, plan), None),
        };
        let (inputs, rules) = (Lane::Inputs(turn), Lane::Rules(turn));
        let (words, tables) = write_inputs(&self.sizes, extent, plan, self.device.lane(inputs));
        let at = self.addresses[Buffer::StepInputs.index()];
        // Tables that are as wide as the buffer's follow the rest there as well.
        let is_whole = tables.n <= 1 || tables.words == tables.pitch;
        let (words, tables) =
            if is_whole { (words + tables.n * tables.words, Rows { n: 0, ..tables }) } else { (words, tables) };
        self.device.send(inputs, at, words)?;
        self.device.send_rows(inputs, words, at + 4 * words as u64, tables)?;
        if !plan.follows.is_empty() {
            self.take_sampled(extent)?;
        }
        self.last = Some((extent, graph));
        self.compute(extent, graph)?;
        // The device computes; meanwhile a policy may still say what it wants.
        self.edits.clear();
        for row in of.rows.iter().filter(|row| row.sample.is_some()) {
            self.edits.push(edits.edit(row.request));
            self.edits.extend(std::iter::repeat_n(None, row.drafts as usize));
        }
        let n_sampled = self.edits.len();
        if n_sampled > 0 {
            let words = write_rules(&self.sizes, extent.sampled, plan, &self.edits, self.device.lane(rules));
            self.device.send(rules, self.addresses[Buffer::Rules.index()], words)?;
            self.choose(extent, graph)?;
            let words = output_words(extent.sampled, n_sampled, plan);
            self.device.receive(Lane::Outputs(turn), self.addresses[Buffer::Outputs.index()], words)?;
        }
        self.device.mark(turn)?;
        Ok(extent.sampled)
    }

    /// Gives the pool so many bytes; of those that it has not had, what leaves the driver its reserve. What it has then, and what is
    /// left beside the reserve.
    fn resize_kv(&mut self, bytes: u64) -> Result<Option<(u64, u64)>, DeviceError> {
        self.device.enter()?;
        let memory = self.device.memory()?;
        let most = self.used.kv + memory.free.saturating_sub(memory.reserve());
        let Some(now) = self.device.resize_pool(bytes, most)? else { return Ok(None) };
        Ok(Some((now, most.saturating_sub(now))))
    }

    fn check_lost(&self) -> Result<(), ExecuteError> {
        self.lost.as_ref().map_or(Ok(()), |what| Err(ExecuteError::Lost { what: Arc::clone(what) }))
    }

    /// After a fault in the middle of a step.
    fn failed(&mut self, error: DeviceError) -> ExecuteError {
        // What was launched before it may still read the lanes, which the next step writes; and a kernel's own fault, which is
        // why a later call was refused, shows here.
        let error = self.device.wait().err().filter(DeviceError::is_lost).unwrap_or(error);
        let what: Arc<str> = error.to_string().into();
        if !error.is_lost() {
            return ExecuteError::Device { what };
        }
        self.lost = Some(Arc::clone(&what));
        ExecuteError::Lost { what }
    }
}

impl Executor for CudaEngine {
    fn execute(
        &mut self,
        plan: &StepPlan,
        edits: &mut dyn EditSource,
        out: &mut StepOutput,
    ) -> Result<(), ExecuteError> {
        self.begin(plan, edits)?;
        self.finish(plan, out)
    }

    fn in_halves(&mut self) -> Option<&mut dyn InHalves> {
        Some(self)
    }

    fn draft_places(&self) -> u32 {
        // Each of several tokens may ask for experts of its own.
        match self.sizes.spec.experts {
            Some(_) => 0,
            None => drafts::MOST_PLACES.min(u32::try_from(self.sizes.config.max_rows).unwrap_or(u32::MAX)),
        }
    }

    fn scores_prompts(&self) -> bool {
        true
    }

    fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    fn resize_pool(&mut self, n_blocks: u32) -> Result<Option<PoolSize>, ExecuteError> {
        self.check_lost()?;
        if !self.begun.is_empty() {
            return Err(ExecuteError::Malformed { what: "another size of the pool while a step is under way" });
        }
        let page = self.sizes.page_bytes();
        let resized = self.resize_kv(u64::from(n_blocks) * page);
        let Some((bytes, spare)) = resized.map_err(|error| self.failed(error))? else { return Ok(None) };
        self.used.kv = bytes;
        let n_blocks = n_blocks.min(u32::try_from(bytes / page).unwrap_or(u32::MAX));
        self.sizes.config.n_blocks = n_blocks as usize;
        Ok(Some(PoolSize { n_blocks, bytes, spare }))
    }

    fn pool_piece(&self) -> u64 {
        self.device.pool_piece()
    }

    fn take_note(&mut self) -> Option<String> {
        self.note.take()
    }
}

impl InHalves for CudaEngine {
    fn begin(&mut self, plan: &StepPlan, edits: &mut dyn EditSource) -> Result<(), ExecuteError> {
        self.check_lost()?;
        self.sizes.config.check_plan(plan, self.sizes.spec.vocab)?;
        drafts::check(plan, self.sizes.config.max_rows)?;
        check_lists(plan)?;
        if self.begun.len() == UNDER_WAY {
            return Err(ExecuteError::Malformed { what: "a third step, where two can be under way" });
        }
        let before = self.begun.back();
        if before.is_some_and(|before| before.is_scored) {
            return Err(ExecuteError::Malformed { what: "a step behind one whose prompts are scored" });
        }
        check_follows(plan, before.map_or(0, |before| before.n_sampled))?;
        let turn = before.map_or_else(Turn::default, |before| before.turn.next());
        let rows = match plan.rows.is_empty() {
            true => 0,
            false => self.run(plan, edits, turn).map_err(|error| self.failed(error))?,
        };
        // Where there are drafts, places are others than the plan's.
        let is_plain = plan.rows.iter().all(|row| row.drafts == 0);
        let n_sampled = plan.rows.iter().filter(|row| row.sample.is_some() && is_plain).count();
        self.begun.push_back(Begun { turn, rows, n_sampled, is_scored: !plan.scores.is_empty() });
        Ok(())
    }

    fn finish(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Result<(), ExecuteError> {
        out.sampled.clear();
        out.after_drafts.clear();
        out.scores.clear();
        let begun = self.begun.pop_front().ok_or(ExecuteError::Malformed { what: "a step that was not begun" })?;
        self.check_lost()?;
        if plan.rows.is_empty() {
            return Ok(());
        }
        self.device.reach(begun.turn).map_err(|error| self.failed(error))?;
        let words = self.device.lane(Lane::Outputs(begun.turn));
        read_outputs((begun.rows, self.sizes.spec.vocab), plan, words, out)?;
        if begun.is_scored { self.score(plan, begun.turn, out) } else { Ok(()) }
    }
}

/// How a device's memory would be divided, and in which form: that of `forms` (best first) which leaves room for a full
/// context. Nothing is allocated; `config.n_blocks` is what this decides and is not read. Where none fits, 8-bit weights are
/// advised if they would.
///
/// # Errors
/// The kernels do not cover the model, or none fits, with what would.
pub fn plan_memory(
    spec: &ModelSpec,
    forms: &[Form],
    config: EngineConfig,
    room: DeviceRoom,
    wish: KvWish,
) -> Result<VramPlan, CudaError> {
    let config = EngineConfig { n_blocks: 1, ..config };
    config.check(spec)?;
    check_spec(spec)?;
    let DeviceRoom { memory, n_sms, has_library } = room;
    let choices = GemmChoices::default;
    let sizes = |form: Form| Sizes { spec: spec.clone(), form, config, n_sms, has_library, choices: choices() };
    let footprint = |form: Form| sizes(form).footprint();
    let footprints: Vec<Footprint> = forms.iter().copied().map(footprint).collect();
    let last = forms.last().filter(|form| form.precision == Precision::F16);
    let smaller = last.map(|form| footprint(Form { precision: Precision::Q8_0, ..*form }));
    Ok(recommend(&footprints, smaller.as_slice(), memory, wish)?)
}

/// What the kernels cover: every decoder that a [`ModelSpec`] can say, but for some sizes.
fn check_spec(spec: &ModelSpec) -> Result<(), CudaError> {
    let group = spec.heads / spec.kv_heads;
    let (experts, chosen) = spec.experts.as_ref().map_or((0, 0), |experts| (experts.count, experts.per_token));
    let refused = [
        (!WIDTHS.contains(&spec.head_dim), "heads of this width", spec.head_dim.to_string(), "32, 64, 96, 128 and 256"),
        (group > 16, "query heads per key head", group.to_string(), "at most 16"),
        (spec.layers > usize::from(u16::MAX), "layers", spec.layers.to_string(), "at most 65535"),
        (experts > MOST_EXPERTS, "experts", experts.to_string(), "at most 512"),
        (chosen > MOST_CHOSEN, "experts per token", chosen.to_string(), "at most 32"),
        (spec.vocab > MOST_TOKENS, "words of a vocabulary", spec.vocab.to_string(), "at most 1048575"),
    ];
    match refused.into_iter().find(|(is_so, ..)| *is_so) {
        Some((_, what, found, supported)) => Err(CudaError::Unsupported { what, found, supported }),
        None => Ok(()),
    }
}

/// Launches a list on a device, whose buffers are at these addresses.
pub(super) fn launch_all(device: &mut dyn Device, addresses: &[u64], plan: &LaunchPlan) -> Result<(), DeviceError> {
    let mut args = [Value::U64(0); MAX_ARGS];
    for launch in &plan.launches {
        let given = plan.args_of(launch);
        for (to, arg) in args.iter_mut().zip(given) {
            *to = match *arg {
                Arg::At(buffer, offset) => Value::Address(addresses[buffer.index()] + offset),
                Arg::U32(n) => Value::U32(n),
                Arg::U64(n) => Value::U64(n),
                Arg::F32(x) => Value::F32(x),
                Arg::Null => Value::Address(0),
            };
        }
        let args = &args[..given.len()];
        if launch.kernel == Kernel::LibraryGemm {
            multiply(device, args)?;
            continue;
        }
        device.launch(&DeviceLaunch {
            kernel: launch.kernel as usize,
            grid: launch.grid,
            block: launch.block,
            shared: launch.shared,
            args,
        })?;
    }
    Ok(())
}

/// Has the device's library compute a product.
fn multiply(device: &mut dyn Device, args: &[Value]) -> Result<(), DeviceError> {
    use Value::{Address, U32, U64};
    let &[U32(id), U32(rows), Address(w), Address(x), Address(y), Address(workspace), U64(workspace_bytes)] = args
    else {
        return Err(DeviceError::NoKernel { entry: format!("a product with {args:?}") });
    };
    device.multiply(GemmId(id as usize), rows as usize, GemmAddresses { w, x, y, workspace, workspace_bytes })
}

/// One allocation per owner, and the lanes; the address of each buffer.
fn allocate(device: &mut dyn Device, sizes: &Sizes, used: &mut VramUse) -> Result<Vec<u64>, DeviceError> {
    let mut addresses = vec![0; Buffer::count(sizes.spec.layers)];
    let pieces = sizes.pieces();
    for owner in [Owner::Weights, Owner::Kv, Owner::Workspace] {
        let own = || pieces.iter().filter(|piece| piece.owner == owner);
        let bytes = own().map(|piece| piece.bytes.next_multiple_of(ALIGN)).sum();
        let allocated = if owner == Owner::Kv { device.allocate_pool(bytes) } else { device.allocate(bytes) };
        let mut at = allocated?;
        for piece in own() {
            addresses[piece.buffer.index()] = at;
            at += piece.bytes.next_multiple_of(ALIGN);
            match piece.buffer {
                Buffer::StepInputs => allocate_lanes(device, Lane::Inputs, piece)?,
                Buffer::Rules => allocate_lanes(device, Lane::Rules, piece)?,
                Buffer::Outputs => allocate_lanes(device, Lane::Outputs, piece)?,
                _ => {}
            }
        }
        match owner {
            Owner::Weights => used.weights = bytes,
            Owner::Kv => used.kv = bytes,
            Owner::Workspace => used.workspace = bytes,
        }
    }
    Ok(addresses)
}

/// A buffer's lanes: one for each step that is under way.
fn allocate_lanes(device: &mut dyn Device, of: fn(Turn) -> Lane, piece: &Piece) -> Result<(), DeviceError> {
    Turn::ALL.into_iter().try_for_each(|turn| device.allocate_lane(of(turn), piece.bytes as usize / 4))
}
