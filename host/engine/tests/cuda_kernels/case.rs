//! The library's cases on the shim, under two orders of threads.

pub(crate) use pointsman_engine::cuda::Element;
use pointsman_engine::cuda::cases::Given;
pub(crate) use pointsman_engine::cuda::cases::{Call, Case, Rng, close};

use crate::shim::{Arg, Launch, Shim};

/// What a call wrote, and the barriers that it met.
pub(crate) struct Done {
    pub(crate) outs: Vec<Vec<u8>>,
    pub(crate) sites: Vec<String>,
}

/// Runs a call with its buffers allocated for it, under an order of threads, without one barrier.
pub(crate) fn run(call: &Call, shim: &mut Shim, seed: u64, skip: &str) -> Result<Done, String> {
    let mut outs = Vec::new();
    let args: Vec<Arg> = call
        .args
        .iter()
        .map(|given| {
            let (bytes, is_out) = match given {
                Given::U32(v) => return Arg::U32(*v),
                Given::U64(v) => return Arg::U64(*v),
                Given::F32(v) => return Arg::F32(*v),
                Given::Null => return Arg::Address(0),
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
    let Call { kernel, grid, block, shared, .. } = call;
    let launch = Launch { kernel, grid: *grid, block: *block, shared: *shared, args: &args, seed, skip };
    let sites = shim.launch(&launch)?;
    let read = |(address, len)| {
        let mut bytes = vec![0; len];
        shim.read(address, &mut bytes);
        bytes
    };
    Ok(Done { outs: outs.into_iter().map(read).collect(), sites })
}

/// Runs cases under two orders of threads, which must not change a bit.
pub(crate) fn check_all(cases: Vec<Case>) {
    let Some(mut shim) = Shim::start() else { return };
    let mut faults = Vec::new();
    for Case { what, call, check } in cases {
        let mut run = |seed| match run(&call, &mut shim, seed, "") {
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
