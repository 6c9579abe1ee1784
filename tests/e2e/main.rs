//! End to end: a real process, real sockets, the embedded model, the committed guests. Few and telling; everything that can
//! be tested closer to the code is.
#![expect(clippy::expect_used, clippy::panic, reason = "a broken host should stop the test where it is")]

mod aliases;
mod batch;
mod bench;
mod cache;
mod client;
mod control;
mod demand;
mod described;
mod doctor;
mod drafts;
mod embed;
mod embeddings;
mod explain;
mod gpus;
mod handover;
mod hangups;
mod hostile;
mod javascript;
mod keys;
mod kills;
mod loads;
mod models;
mod oci;
mod operate;
mod operation;
mod progressive;
mod restart;
mod rollouts;
mod routers;
mod sampler;
mod shadow;
mod signals;
mod swaps;
mod tls;
mod tools;
mod trust;
mod upstreams;
mod variants;
mod wires;

#[expect(clippy::unwrap_used, reason = "tests, and the functions they share")]
#[expect(dead_code, reason = "the engine's tests need more of it")]
#[path = "../../host/engine/tests/cuda_driver/library.rs"]
mod library;
#[expect(dead_code, reason = "the engine's tests need more of it")]
#[path = "../../host/engine/tests/cuda_kernels/shim.rs"]
mod shim;

use pointsman_tests::Host;

/// A host on the built-in policies.
fn host(settings: &[(&str, &str)]) -> Host {
    Host::start(env!("CARGO_BIN_EXE_pointsman-under-test"), settings)
}

/// A document that cannot be written: a folder stands in its place, and not even root can write over that.
struct Refused(std::path::PathBuf);

fn refuse(document: &std::path::Path) -> Refused {
    std::fs::rename(document, document.with_extension("aside")).expect("a document");
    std::fs::create_dir(document).expect("a folder");
    Refused(document.to_owned())
}

impl Refused {
    fn end(self) {
        std::fs::remove_dir(&self.0).expect("the folder");
        std::fs::rename(self.0.with_extension("aside"), &self.0).expect("the document");
    }
}

/// Every line of a host's journal.
fn journal(host: &Host) -> Vec<serde_json::Value> {
    let text = host.admin("GET", "/admin/v1/journal", &serde_json::Value::Null).body;
    match text {
        // One line alone is JSON as a whole.
        serde_json::Value::String(lines) => {
            lines.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
        }
        line => vec![line],
    }
}
