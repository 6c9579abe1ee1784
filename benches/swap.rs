//! From uploaded bytes to an active policy, as the admin API does it: checks, compilation in a child process, `init`, probes,
//! warm instances, pointer swap. Every upload has new bytes (a custom section with a counter), so nothing is cached. Bars:
//! 100 ms from upload to active, 5 us for the publish.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use pointsman_benches::{Samples, header, now};
use pointsman_policy::{
    Activation, Compile, CompileCommand, CompileLimits, Runtime, RuntimeConfig, Slot, compile_child_main,
};
use pointsman_telemetry::{Metrics, Recorder};

const UPLOADS: u64 = 40;

/// The component with a custom section that makes it another one.
fn with_counter(component: &[u8], counter: u64) -> Vec<u8> {
    let mut bytes = component.to_vec();
    // Section 0, its size, a name of one byte, eight bytes of content.
    bytes.extend([0, 10, 1, b'n']);
    bytes.extend(counter.to_le_bytes());
    bytes
}

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("__compile") {
        return ExitCode::from(compile_child_main());
    }
    header("swap: upload to active, and the publish alone");
    let program = std::env::current_exe().unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
    let start = now();
    let clock = Arc::new(move || u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX) + 1);
    let config = RuntimeConfig {
        cache_dir: Some(folder.path().to_owned()),
        compile: Compile::Child {
            command: CompileCommand { program, args: vec!["__compile".into()] },
            limits: CompileLimits {
                time: Duration::from_secs(30),
                memory_bytes: 2 << 30,
                max_output_bytes: 256 << 20,
                queue: Duration::from_secs(5),
            },
        },
        ..RuntimeConfig::default()
    };
    let runtime =
        Runtime::new(config, Arc::new(Metrics::new()), Recorder::new(1_024), clock).unwrap_or_else(|e| panic!("{e}"));
    let slot = runtime.router_slot("router");
    let mut generation = 0;
    for name in ["route-least-loaded", "route-weighted"] {
        let path = pointsman_tests::root().join(format!("plugins/prebuilt/{name}.wasm"));
        let guest = std::fs::read(path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (mut whole, mut admit, mut prepare, mut publish) = <(Samples, Samples, Samples, Samples)>::default();
        for _ in 0..UPLOADS {
            generation += 1;
            let bytes = with_counter(&guest, generation);
            let start = now();
            let component = runtime.admit(&bytes).unwrap_or_else(|e| panic!("{e}"));
            assert!(!component.cached, "every upload is compiled");
            admit.add(start.elapsed());
            let activation =
                Activation { slot: "router".into(), generation, config: "{}".into(), ..Activation::default() };
            let preparing = now();
            let prepared = runtime.prepare(&component, activation).unwrap_or_else(|e| panic!("{e}"));
            prepare.add(preparing.elapsed());
            let published = slot.publish(prepared).unwrap_or_else(|e| panic!("{e}"));
            whole.add(start.elapsed());
            publish.add(Duration::from_nanos((published.publish_us * 1e3) as u64));
        }
        let kb = guest.len() / 1_000;
        whole.percentiles().print(&format!("{name} ({kb} KB), upload to active"), Some(Duration::from_millis(100)));
        admit.percentiles().print("  of that: check and compile", None);
        prepare.percentiles().print("  of that: init, probe, warm", None);
        publish.percentiles().print("publish", Some(Duration::from_micros(5)));
    }
    ExitCode::SUCCESS
}
