//! The kernels' shim as a device: a process that keeps the memory and runs launches at once, in order.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pointsman_engine::cuda::{
    Device, DeviceError, DeviceInfo, DeviceLaunch, Element, Gemm, GemmAddresses, GemmId, GemmOutput, GraphId, Lane,
    Rows, Turn, Value, VramFree,
};

use crate::shim::{Arg, Launch, Shim};

/// Memory that the device claims to have.
const TOTAL: u64 = 1 << 30;

/// A launch that was captured: kernel, grid, block, shared memory, arguments.
type Recorded = (usize, [u32; 3], u32, u32, Vec<Value>);

#[derive(Debug)]
pub(crate) struct ShimDevice {
    info: DeviceInfo,
    shim: Shim,
    entries: HashMap<usize, String>,
    lanes: [Vec<u32>; Lane::COUNT],
    taken: u64,
    capturing: Option<Vec<Recorded>>,
    graphs: Vec<Vec<Recorded>>,
    /// Of the order of blocks and threads; another one for each launch.
    seed: u64,
    /// Every launch fails from this one on, as those of a lost device do.
    pub(crate) fails_after: Option<u64>,
    /// This launch alone is refused.
    pub(crate) refuses: Option<u64>,
    /// So many captures end well, and none after them.
    pub(crate) captures: usize,
    /// Lanes that a copy reads or writes until their turn is reached, and turns that have ended since they were.
    in_flight: [bool; Lane::COUNT],
    ended: [bool; 2],
    pub(crate) library: Option<ShimLibrary>,
    /// What has been computed since the timer was started; a launch counts 1.
    work: f64,
}

/// A library of products that computes them number by number.
#[derive(Clone, Debug, Default)]
pub(crate) struct ShimLibrary {
    /// Of a product by each algorithm that it advises, in launches; none is of one that is refused.
    cost: Vec<Option<f64>>,
    /// Products computed.
    pub(crate) computed: Arc<AtomicUsize>,
    /// The algorithm of the last of them.
    pub(crate) last: Arc<AtomicUsize>,
    /// It computes no more.
    pub(crate) refuses: Arc<AtomicBool>,
    /// All that it was asked for.
    gemms: Vec<Gemm>,
}

impl ShimLibrary {
    pub(crate) fn of(cost: &[Option<f64>]) -> Self {
        Self { cost: cost.to_vec(), ..Self::default() }
    }
}

impl ShimDevice {
    /// `None` without a C++ compiler.
    pub(crate) fn start() -> Option<Self> {
        let info = DeviceInfo { name: "the CPU".to_owned(), n_sms: 4, capability: (9, 0) };
        Some(Self {
            info,
            shim: Shim::start()?,
            entries: HashMap::new(),
            lanes: Default::default(),
            taken: 0,
            capturing: None,
            graphs: Vec::new(),
            seed: 1,
            fails_after: None,
            refuses: None,
            captures: usize::MAX,
            in_flight: [false; Lane::COUNT],
            ended: [false; 2],
            library: None,
            work: 0.0,
        })
    }

    /// Notes that a copy is on its way.
    fn copies(&mut self, lane: Lane) {
        self.in_flight[lane.index()] = true;
        self.ended[lane.turn() as usize] = false;
    }

    fn numbers(&mut self, at: u64, element: Element, n: usize) -> Vec<f64> {
        let mut bytes = vec![0; n * element.bytes()];
        self.shim.read(at, &mut bytes);
        element.decode(&bytes)
    }

    /// The product, from memory to memory.
    fn compute(&mut self, gemm: &Gemm, rows: usize, at: GemmAddresses) {
        let Gemm { element, k, n, output } = *gemm;
        let to = if output == GemmOutput::Store { element } else { Element::F32 };
        let (w, x) = (self.numbers(at.w, element, n * k), self.numbers(at.x, element, rows * k));
        let mut y = match output {
            GemmOutput::AddToF32 => self.numbers(at.y, to, rows * n),
            _ => vec![0.0; rows * n],
        };
        for (y, x) in y.chunks_mut(n).zip(x.chunks(k)) {
            for (y, w) in y.iter_mut().zip(w.chunks(k)) {
                *y += w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
            }
        }
        self.shim.write(at.y, &to.encode(&y));
        // It may write all that it was given.
        self.shim.write(at.workspace, &vec![0xff; at.workspace_bytes as usize]);
    }

    fn lost(text: &str) -> DeviceError {
        DeviceError::Lost { call: "launch", code: "SHIM".into(), text: text.into() }
    }

    fn run(&mut self, (kernel, grid, block, shared, args): &Recorded) -> Result<(), DeviceError> {
        self.seed += 1;
        self.work += 1.0;
        if self.fails_after.is_some_and(|last| self.seed > last) {
            return Err(Self::lost("as asked"));
        }
        if self.refuses == Some(self.seed) {
            return Err(DeviceError::Driver { call: "launch", code: "SHIM".into(), text: "as asked".into() });
        }
        let arg = |value: &Value| match *value {
            Value::Address(n) => Arg::Address(n),
            Value::U32(n) => Arg::U32(n),
            Value::U64(n) => Arg::U64(n),
            Value::F32(x) => Arg::F32(x),
        };
        let args: Vec<Arg> = args.iter().map(arg).collect();
        let Some(entry) = self.entries.get(kernel) else {
            return Err(DeviceError::NoKernel { entry: kernel.to_string() });
        };
        let launch = Launch {
            kernel: entry,
            grid: *grid,
            block: *block,
            shared: *shared,
            args: &args,
            seed: self.seed,
            skip: "",
        };
        self.shim.launch(&launch).map(drop).map_err(|text| Self::lost(&text))
    }
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Device for ShimDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory(&mut self) -> Result<VramFree, DeviceError> {
        Ok(VramFree { total: TOTAL, free: TOTAL - self.taken })
    }

    fn enter(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn load(&mut self, entries: &[(usize, String)]) -> Result<(), DeviceError> {
        self.entries.extend(entries.iter().cloned());
        Ok(())
    }

    fn allocate(&mut self, bytes: u64) -> Result<u64, DeviceError> {
        if self.taken + bytes > TOTAL {
            return Err(DeviceError::OutOfMemory { asked: bytes, free: TOTAL - self.taken });
        }
        self.taken += bytes;
        let at = self.shim.allocate(bytes as usize);
        self.shim.write(at, &vec![0; bytes as usize]);
        Ok(at)
    }

    fn allocate_lane(&mut self, lane: Lane, words: usize) -> Result<(), DeviceError> {
        self.lanes[lane.index()] = vec![0; words];
        Ok(())
    }

    fn lane(&mut self, lane: Lane) -> &mut [u32] {
        assert!(!self.in_flight[lane.index()], "{lane:?} is touched before a wait");
        &mut self.lanes[lane.index()]
    }

    fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.shim.write(to, bytes);
        Ok(())
    }

    fn download(&mut self, from: u64, words: &mut [u32]) -> Result<(), DeviceError> {
        let mut bytes = vec![0; 4 * words.len()];
        self.shim.read(from, &mut bytes);
        let (quads, _) = bytes.as_chunks();
        words.iter_mut().zip(quads).for_each(|(word, quad)| *word = u32::from_le_bytes(*quad));
        Ok(())
    }

    fn send(&mut self, lane: Lane, to: u64, words: usize) -> Result<(), DeviceError> {
        self.copies(lane);
        let bytes = bytes(&self.lanes[lane.index()][..words]);
        self.upload(to, &bytes)
    }

    fn send_rows(&mut self, lane: Lane, from: usize, to: u64, rows: Rows) -> Result<(), DeviceError> {
        self.copies(lane);
        for i in 0..rows.n {
            let row = bytes(&self.lanes[lane.index()][from + i * rows.words..][..rows.words]);
            self.upload(to + 4 * (i * rows.pitch) as u64, &row)?;
        }
        Ok(())
    }

    fn receive(&mut self, lane: Lane, from: u64, words: usize) -> Result<(), DeviceError> {
        self.copies(lane);
        let mut read = vec![0; words];
        self.download(from, &mut read)?;
        self.lanes[lane.index()][..words].copy_from_slice(&read);
        Ok(())
    }

    fn launch(&mut self, launch: &DeviceLaunch<'_>) -> Result<(), DeviceError> {
        let recorded = (launch.kernel, launch.grid, launch.block, launch.shared, launch.args.to_vec());
        match &mut self.capturing {
            Some(graph) => graph.push(recorded),
            None => self.run(&recorded)?,
        }
        Ok(())
    }

    fn has_library(&self) -> bool {
        self.library.is_some()
    }

    fn gemms(&mut self, gemm: &Gemm, _: usize, _: u64) -> Result<Vec<GemmId>, DeviceError> {
        let Some(library) = &mut self.library else { return Ok(Vec::new()) };
        let first = library.gemms.len() * library.cost.len();
        library.gemms.push(*gemm);
        Ok((first..first + library.cost.len()).map(GemmId).collect())
    }

    fn multiply(&mut self, id: GemmId, rows: usize, at: GemmAddresses) -> Result<(), DeviceError> {
        assert!(self.capturing.is_none(), "the library's products are not captured");
        let library = self.library.clone().expect("it advised an algorithm");
        let algorithm = id.0 % library.cost.len();
        let refused = library.refuses.load(Ordering::Relaxed);
        let Some(cost) = library.cost[algorithm].filter(|_| !refused) else {
            return Err(DeviceError::Library { call: "multiply", code: 15, text: "as asked" });
        };
        self.compute(&library.gemms[id.0 / library.cost.len()], rows, at);
        self.work += cost;
        library.computed.fetch_add(1, Ordering::Relaxed);
        library.last.store(algorithm, Ordering::Relaxed);
        Ok(())
    }

    fn start_timer(&mut self) -> Result<(), DeviceError> {
        self.work = 0.0;
        Ok(())
    }

    fn stop_timer(&mut self) -> Result<f64, DeviceError> {
        self.wait()?;
        Ok(self.work)
    }

    fn captures(&self) -> bool {
        true
    }

    fn begin_capture(&mut self) -> Result<(), DeviceError> {
        assert!(self.capturing.is_none(), "one capture at a time");
        self.capturing = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&mut self) -> Result<GraphId, DeviceError> {
        let captured = self.capturing.take().expect("a capture was begun");
        if self.graphs.len() == self.captures {
            return Err(DeviceError::Driver {
                call: "cuStreamEndCapture",
                code: "901".into(),
                text: "as asked".into(),
            });
        }
        self.graphs.push(captured);
        Ok(GraphId(self.graphs.len() - 1))
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), DeviceError> {
        assert!(self.capturing.is_none(), "a replay cannot be captured");
        for launch in self.graphs[graph.0].clone() {
            self.run(&launch)?;
        }
        Ok(())
    }

    fn mark(&mut self, turn: Turn) -> Result<(), DeviceError> {
        self.ended[turn as usize] = true;
        Ok(())
    }

    fn reach(&mut self, turn: Turn) -> Result<(), DeviceError> {
        assert!(self.ended[turn as usize], "{turn:?} has not ended");
        for lane in [Lane::Inputs(turn), Lane::Rules(turn), Lane::Outputs(turn)] {
            self.in_flight[lane.index()] = false;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        assert!(self.capturing.is_none(), "waiting ends a capture");
        self.in_flight = [false; Lane::COUNT];
        Ok(())
    }
}
