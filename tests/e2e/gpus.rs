//! A host on GPUs, without one: the driver is the engine's stand-in for NVIDIA's, whose devices compute on the CPU.
//!
//! What the engine's own tests leave open is everything between a request and the device: plans of memory, loads beside models that
//! serve, pools that make room, devices that cannot serve a model, and devices that go.

use std::path::Path;
use std::process::Command;

use pointsman_tests::{Answer, Host, looks};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::embeddings::tiny;
use crate::library;
use crate::loads::{PROGRAM, ask, folder, load, unload};

/// What a person may write into the configuration of a host with small batches: devices compute slowly here.
const SMALL: &str = "
[sched]
max_running = 2
max_batch_tokens = 32
prefill_chunk_tokens = 32
";

/// A host beside a driver, and what becomes of its devices.
struct Beside {
    host: Host,
    mishaps: TempDir,
}

impl Beside {
    /// On these devices; `None` where no driver can be made.
    fn start(devices: &str, engine: &str, models: &Path, n_devices: &str) -> Option<Self> {
        Self::start_with((devices, engine, models), n_devices, ("", ""))
    }

    /// With more models, and after what has happened before.
    fn start_with(
        (devices, engine, models): (&str, &str, &Path),
        n_devices: &str,
        (more, before): (&str, &str),
    ) -> Option<Self> {
        let driver = library::folder()?;
        let mishaps = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(mishaps.path().join("list"), before).expect("a temporary file");
        let (list, models) = (mishaps.path().join("list"), models.display());
        let config = format!(
            "[engine]\ndemo = false\ndevices = {devices}\nkv_mib = 8\ncublaslt = false\nmodel_dirs = [\"{models}\"]\n\
             {engine}\n[models]\nmini = \"{models}/mini\"\n{more}\n{SMALL}"
        );
        let nowhere = Path::new("");
        // Without a compiler of NVIDIA's, whose code the driver would not take.
        let variables = [
            ("LD_LIBRARY_PATH", &*driver),
            ("PM_DRIVER_MISHAPS", &list),
            ("PM_DRIVER_DEVICES", Path::new(n_devices)),
            ("PATH", nowhere),
            ("CUDA_HOME", nowhere),
            ("CUDA_PATH", nowhere),
            ("VIRTUAL_ENV", nowhere),
            ("CONDA_PREFIX", nowhere),
        ];
        Some(Self { host: Host::surrounded(PROGRAM, &config, &variables), mishaps })
    }

    fn happens(&self, what: &str) {
        std::fs::write(self.mishaps.path().join("list"), what).expect("a temporary file");
    }

    fn device(&self, name: &str) -> Value {
        let devices = self.host.admin("GET", "/admin/v1/devices", &Value::Null).body;
        let found = devices["data"].as_array().and_then(|all| all.iter().find(|device| device["name"] == name));
        found.unwrap_or_else(|| panic!("no {name}: {devices}")).clone()
    }

    fn metrics(&self) -> String {
        self.host.get("/metrics").body.as_str().expect("text").to_owned()
    }

    fn memory(&self, of: &str) -> u64 {
        self.device("cuda:0")["memory"][of].as_u64().unwrap_or_else(|| panic!("no {of}"))
    }

    /// Blocks of each pool on the first GPU.
    fn pools(&self) -> Vec<u64> {
        let device = self.device("cuda:0");
        let replicas = device["replicas"].as_array().expect("replicas");
        replicas.iter().map(|replica| replica["kv_blocks"].as_u64().expect("a number")).collect()
    }
}

fn says(answer: &Answer) -> (String, String) {
    assert_eq!(answer.status, 200, "{answer:?}");
    let replica = answer.headers["x-pointsman-replica"].to_str().expect("text").to_owned();
    (replica, answer.body["choices"][0]["text"].as_str().expect("a text").to_owned())
}

#[test]
fn a_gpu_says_what_the_cpu_says_and_counts_what_it_has() {
    let models = folder();
    let Some(gpu) = Beside::start("[\"auto\"]", "max_context = 512", models.path(), "1") else { return };
    let cpu = Host::configured(PROGRAM, &format!("[models]\nmini = {:?}\n", models.path().join("mini")));
    // One prompt of several chunks, and the step of one token behind another.
    let prompt = "Ownership is a set of rules that govern how a program manages memory. ".repeat(3);
    for (prompt, tokens) in [("Ownership is", 6), (&*prompt, 3)] {
        let asked =
            json!({"model": "mini", "prompt": prompt, "temperature": 0, "max_tokens": tokens, "ignore_eos": true});
        let (on, said) = says(&gpu.host.post("/v1/completions", &asked));
        assert_eq!((&*on, said), ("mini:f16@cuda:0", says(&cpu.post("/v1/completions", &asked)).1));
    }
    // How likely a prompt is that comes in two chunks, each scored in pieces of two rows.
    let asked = json!({"model": "mini", "prompt": prompt, "echo": true, "logprobs": 2, "max_tokens": 0});
    let scores = |host: &Host| host.post("/v1/completions", &asked).body["choices"][0]["logprobs"].clone();
    let (on, expect) = (scores(&gpu.host), scores(&cpu));
    let numbers = |scores: &Value| -> Vec<f64> {
        let all = scores["token_logprobs"].as_array().unwrap_or_else(|| panic!("no scores: {scores}"));
        all.iter().skip(1).map(|number| number.as_f64().expect("a number")).collect()
    };
    let pairs: Vec<(f64, f64)> = numbers(&on).into_iter().zip(numbers(&expect)).collect();
    assert!(pairs.len() > 32 && pairs.iter().all(|(a, b)| (a - b).abs() < 0.02 && *a < 0.0), "{pairs:?}");
    assert_eq!(
        (&on["tokens"], &on["top_logprobs"][9].as_object().map(|top| top.len() >= 2)),
        (&expect["tokens"], &Some(true))
    );
    let device = gpu.device("cuda:0");
    assert_eq!((&device["index"], &device["state"]), (&json!(1), &json!("up")));
    assert_eq!((&device["memory"]["total"], gpu.pools()), (&json!(1_u64 << 30), vec![64]), "two full contexts");
    let log = gpu.host.log();
    for line in
        ["mini:f16@cuda:0: weights 1.", "KV pool 0.8 MiB (64 blocks)", "up to 2 sequences at once, 2 of 512 tokens"]
    {
        assert!(log.contains(line), "no `{line}`: {log}");
    }
    assert_eq!(log.matches("NVRTC was not found").count(), 1, "{log}");
    let metrics = gpu.metrics();
    assert!(metrics.contains(r#"pointsman_device_memory_bytes{device="cuda:0",owner="weights"}"#), "{metrics}");
}

#[test]
fn drafts_come_true_on_a_gpu() {
    let models = folder();
    let Some(gpu) = Beside::start("[\"cuda:0\"]", "max_context = 512", models.path(), "1") else { return };
    // With one request, one of a step's two places is a draft's.
    let [plain, drafted] = [0, 5].map(|drafts| {
        let asked = json!({"model": "mini", "prompt": "one two three one two three one two", "temperature": 0,
            "max_tokens": 24, "ignore_eos": true, "logit_bias": {"3": 100, "4": 100}, "presence_penalty": 2.0,
            "frequency_penalty": 2.0, "speculative_config": {"method": "ngram", "num_speculative_tokens": drafts}});
        gpu.host.post("/v1/completions", &asked)
    });
    assert_eq!(says(&plain), says(&drafted));
    let n_accepted = |answer: &Answer| {
        let details = &answer.body["usage"]["completion_tokens_details"];
        details["accepted_prediction_tokens"].as_u64().unwrap_or_default()
    };
    assert!(n_accepted(&plain) == 0 && n_accepted(&drafted) >= 4, "{drafted:?}");
    let metrics = gpu.metrics();
    let of = |kind| format!(r#"pointsman_draft_tokens_total{{kind="{kind}",method="ngram",variant="mini:f16"}}"#);
    assert!(["proposed", "accepted"].iter().all(|kind| metrics.contains(&of(kind))), "{metrics}");
}

#[test]
fn pools_make_room_for_a_model_that_comes_and_grow_when_it_has_gone() {
    let models = folder();
    let Some(gpu) = Beside::start("[\"cuda:0\"]", "", models.path(), "1") else { return };
    let (mini, kv) = (models.path().join("mini"), gpu.memory("kv"));
    assert_eq!(gpu.pools(), [128]);
    let is_told = |blocks: u64| gpu.metrics().contains(&format!(r#"num_gpu_blocks="{blocks}""#));
    assert!(is_told(128));
    // Another process leaves a quarter of a pool, beside what the same model takes once more.
    let (own, graphs, reserve) = (gpu.memory("weights") + gpu.memory("workspace"), 512 << 10, 256 << 20);
    let held = own + kv;
    let taken = (1_u64 << 30) - held - reserve - own - graphs - kv / 4;
    gpu.happens(&format!("taken 0 {taken}"));
    let before = says(&gpu.host.post("/v1/completions", &ask("mini", 4)));
    // While a long answer is on its way, whose blocks are in the way.
    let (during, loaded) = std::thread::scope(|scope| {
        let long = scope.spawn(|| says(&gpu.host.post("/v1/completions", &ask("mini", 24))).1);
        let is_running = || gpu.device("cuda:0")["replicas"][0]["running"] == 1;
        assert!(looks().any(|_| is_running()), "nothing runs");
        let loaded = load(&gpu.host, "more", &mini);
        (long.join().expect("an answer"), loaded)
    });
    assert_eq!((loaded.status, &loaded.body["unserved"]), (201, &Value::Null), "{loaded:?}");
    let pools = gpu.pools();
    assert!(pools.iter().all(|blocks| (64..128).contains(blocks)) && pools.len() == 2, "{pools:?}");
    assert!(gpu.memory("kv") < 2 * kv && !is_told(128) && is_told(pools[0]), "{pools:?}");
    for name in ["mini", "more"] {
        assert_eq!(says(&gpu.host.post("/v1/completions", &ask(name, 4))).1, before.1, "{name}");
    }
    // A third finds nothing that pools could give: what they have is one full context each.
    let refused = load(&gpu.host, "third", &mini);
    let told = refused.body["error"]["message"].as_str().expect("a message");
    assert!(refused.status == 422 && told.contains("the model does not fit on this device"), "{refused:?}");
    assert_eq!(gpu.pools(), pools, "who cannot be helped is not waited on");
    assert_eq!(unload(&gpu.host, "more", "").status, 200);
    assert_eq!((gpu.pools(), gpu.memory("kv")), (vec![128], kv));
    assert_eq!(says(&gpu.host.post("/v1/completions", &ask("mini", 24))).1, during);
}

#[test]
fn a_model_that_needs_both_has_pools_shrink_and_a_lent_one_go() {
    let (models, encoder) = (folder(), tiny());
    let (mini, demo) = (models.path().join("mini"), models.path().join("demo"));
    let lent = format!("[on_demand]\nlent = {mini:?}\nwords = {:?}", encoder.path());
    let one = ("[\"cuda:0\"]", "", models.path());
    let Some(gpu) = Beside::start_with(one, "1", (&lent, "")) else { return };
    // What the large one takes, and with the pool that it must have.
    let alone = || ["weights", "workspace", "graphs", "kv"].map(|owner| gpu.memory(owner));
    let before = alone();
    assert_eq!(load(&gpu.host, "large", &demo).status, 201);
    let after = alone();
    let [weights, workspace, graphs, kv] = [0, 1, 2, 3].map(|owner| after[owner] - before[owner]);
    assert_eq!(unload(&gpu.host, "large", "").status, 200);
    // The one whose turn would be first, and which has nothing of the GPU.
    assert_eq!(gpu.host.post("/v1/embeddings", &json!({"model": "words", "input": "w5"})).status, 200);
    assert_eq!(says(&gpu.host.post("/v1/completions", &ask("lent", 2))).0, "lent:f16@cuda:0");
    let both = alone();
    let lent = both.iter().zip(before).map(|(both, before)| both - before).sum::<u64>();
    // Room for the large one with one context and for half the pool of the one that stays: neither what the lent one has nor what
    // pools can give is enough.
    let stays = before[0] + before[1] + before[2] + before[3] / 2;
    let (reserve, spare) = (256 << 20, 512 << 10);
    assert!(lent - before[3] / 2 > spare && before[3] / 2 > spare, "{lent} {before:?}");
    let needed = weights + workspace + graphs + kv / 2 + stays + reserve + spare;
    gpu.happens(&format!("taken 0 {}", (1_u64 << 30) - needed));
    let loaded = load(&gpu.host, "large", &demo);
    assert_eq!((loaded.status, &loaded.body["unserved"]), (201, &Value::Null), "{loaded:?}");
    let pools = gpu.pools();
    assert!(pools.len() == 2 && pools.iter().all(|blocks| (64..128).contains(blocks)), "{pools:?}");
    let log = gpu.host.log();
    assert!(
        log.contains("`lent` was unloaded for another model") && log.contains("KV pools on cuda:0 shrink"),
        "{log}"
    );
    assert!(!log.contains("`words` was unloaded"), "{log}");
    assert_eq!(says(&gpu.host.post("/v1/completions", &ask("large", 2))).0, "large:f16@cuda:0");
}

#[test]
fn models_of_one_start_share_a_gpu_whichever_comes_first() {
    let models = folder();
    // `mini` comes before `more`, which is several times as large.
    let more = format!("more = \"{}\"", models.path().join("demo").display());
    let one = ("[\"cuda:0\"]", "", models.path());
    let Some(gpu) = Beside::start_with(one, "1", (&more, "")) else { return };
    let device = gpu.device("cuda:0");
    let said = ["mini", "more"].map(|name| says(&gpu.host.post("/v1/completions", &ask(name, 2))).1);
    let of = |owner: &str| device["memory"][owner].as_u64().expect("bytes");
    let catalog = gpu.host.admin("GET", "/admin/v1/models", &Value::Null).body;
    let kv = |at: usize| catalog["data"][at]["replicas"][0]["memory"]["kv"].as_u64().expect("bytes");
    assert_eq!((gpu.pools(), kv(0) + kv(1)), (vec![128, 128], of("kv")));
    drop(gpu);
    // Of the pools there is room for one context of the large model, and for less than the first one has of the small one.
    let (graphs, reserve) = (1 << 20, 256 << 20);
    let needed = of("weights") + of("workspace") + graphs + reserve + kv(1) / 2 + kv(0) / 2;
    let taken = format!("taken 0 {}", (1_u64 << 30) - needed);
    let gpu = Beside::start_with(one, "1", (&more, &taken)).expect("a driver");
    let pools = gpu.pools();
    // What was left over the first one has again.
    assert!((64..=128).contains(&pools[0]) && (64..128).contains(&pools[1]), "{pools:?}");
    assert!(gpu.host.log().contains("KV pools on cuda:0 shrink to"), "{}", gpu.host.log());
    for (name, said) in ["mini", "more"].into_iter().zip(said) {
        assert_eq!(says(&gpu.host.post("/v1/completions", &ask(name, 2))).1, said, "{name}");
    }
}

#[test]
fn an_operator_bounds_pools_and_clears_caches() {
    let models = folder();
    let Some(gpu) = Beside::start("[\"cuda:0\", \"cpu\"]", "", models.path(), "1") else { return };
    let bound = |device: &str, mib: Value| {
        gpu.host.admin("PUT", &format!("/admin/v1/devices/{device}/kv-pools"), &json!({ "mib": mib }))
    };
    let kv = gpu.memory("kv");
    assert_eq!(gpu.pools(), [128]);
    let few = bound("cuda:0", json!(1));
    assert!(few.status == 200 && (64..86).contains(&gpu.pools()[0]) && gpu.memory("kv") <= 1 << 20, "{few:?}");
    let (said, seen) = (gpu.device("cuda:0"), &few.body["replicas"][0]);
    assert_eq!((&said["kv_pool_bound"], &seen["kv_most_blocks"]), (&json!(1 << 20), &json!(128)));
    // It holds whatever comes and goes, and for what comes.
    assert_eq!(load(&gpu.host, "more", &models.path().join("mini")).status, 201);
    assert!(gpu.pools().iter().all(|blocks| *blocks < 86) && gpu.memory("kv") <= 2 << 20, "{:?}", gpu.pools());
    assert_eq!(unload(&gpu.host, "more", "").status, 200);
    assert!(gpu.memory("kv") <= 1 << 20);
    assert_eq!((bound("cuda:0", Value::Null).status, gpu.pools(), gpu.memory("kv")), (200, vec![128], kv));
    assert_eq!(gpu.device("cuda:0")["kv_pool_bound"], Value::Null);
    for (device, status, told) in [("cpu", 409, "engine.kv_mib"), ("cuda:1", 404, "there are cuda:0, cpu")] {
        let refused = bound(device, json!(1));
        assert!(refused.status == status && refused.body.to_string().contains(told), "{refused:?}");
    }
    // Whichever replica a request goes to.
    let prompt = "Ownership is a set of rules that govern how a program manages memory. ".repeat(2);
    let asked = json!({"model": "mini", "prompt": prompt, "max_tokens": 1});
    let cached = |answer: &Answer| answer.body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    let first = gpu.host.post("/v1/completions", &asked);
    let device = if says(&first).0.ends_with("@cpu") { "cpu" } else { "cuda:0" };
    assert_eq!(cached(&first), Some(0));
    let held = || gpu.device(device)["replicas"][0]["kv_cached_blocks"].as_u64();
    assert!(held() > Some(0));
    let cleared = gpu.host.admin("DELETE", &format!("/admin/v1/devices/{device}/prefix-cache"), &Value::Null);
    let data = &cleared.body["data"][0];
    assert_eq!((&data["name"], held()), (&json!(format!("mini:f16@{device}")), Some(0)));
    assert!(data["kv_blocks"].as_u64() > Some(1), "{cleared:?}");
    assert_eq!(cached(&gpu.host.post("/v1/completions", &asked)), Some(0), "it is found nowhere");
    let none = gpu.host.admin("DELETE", "/admin/v1/devices/tpu/prefix-cache", &Value::Null);
    assert!(none.status == 404 && none.body.to_string().contains("there is no device `tpu` here"), "{none:?}");
}

#[test]
fn pools_whose_memory_cannot_be_mapped_keep_their_size() {
    let models = folder();
    let start = ("[\"cuda:0\"]", "", models.path());
    let Some(gpu) = Beside::start(start.0, start.1, start.2, "1") else { return };
    let bound = |mib: Value| gpu.host.admin("PUT", "/admin/v1/devices/cuda:0/kv-pools", &json!({ "mib": mib }));
    let said = says(&gpu.host.post("/v1/completions", &ask("mini", 4))).1;
    assert_eq!(bound(json!(1)).status, 200);
    let (few, kv) = (gpu.pools(), gpu.memory("kv"));
    gpu.happens("unmappable 0");
    assert_eq!((bound(Value::Null).status, gpu.pools(), gpu.memory("kv")), (200, few, kv), "as far as there is room");
    gpu.happens("");
    assert_eq!((bound(Value::Null).status, gpu.pools()), (200, vec![128]));
    assert_eq!(says(&gpu.host.post("/v1/completions", &ask("mini", 4))).1, said);
}

#[test]
fn doctor_says_how_memory_would_be_divided_before_anything_is_loaded() {
    let Some(driver) = library::folder() else { return };
    let (models, data) = (folder(), tempfile::tempdir().expect("a temporary folder"));
    let doctor = |mib: &str| {
        let mut command = Command::new(PROGRAM);
        command.args(["doctor", "--device", "cuda:0", "--precision", "f16", "--precision", "fp8", "--data-dir"]);
        command.arg(data.path()).arg("--model").arg(format!("mini={}", models.path().join("mini").display()));
        let output = command.env("LD_LIBRARY_PATH", &driver).env("PM_DRIVER_MIB", mib).output().expect("it runs");
        String::from_utf8(output.stdout).expect("text")
    };
    let enough = doctor("1024");
    for told in [
        "the shim, 1.00 GiB, compute capability 9.0",
        "mini:f16 on cuda:0: weights 1.",
        "mini:fp8 on cuda:0: weights",
        "up to 64 sequences at once, 64 of 1024 tokens each",
    ] {
        assert!(enough.contains(told), "no `{told}`: {enough}");
    }
    let little = doctor("257");
    assert!(little.contains("mini:f16 on cuda:0: the model does not fit on this device: weights 1."), "{little}");
}

#[test]
fn a_device_that_cannot_serve_a_model_leaves_it_to_the_others_and_says_why() {
    let models = folder();
    let Some(gpu) = Beside::start("[\"cuda:0\", \"cpu\"]", "", models.path(), "1") else { return };
    gpu.happens("taken 0 1073741824");
    let loaded = load(&gpu.host, "more", &models.path().join("mini"));
    assert_eq!(loaded.status, 201, "{loaded:?}");
    let unserved = loaded.body["unserved"].as_array().expect("a list");
    assert_eq!((&unserved[0]["variant"], &unserved[0]["device"]), (&json!("more:f16"), &json!("cuda:0")));
    let why = unserved[0]["error"].as_str().expect("a text");
    assert!(why.starts_with("the model does not fit on this device: weights 1."), "{why}");
    assert!(why.contains("are missing even for the shortest context: choose another device"), "{why}");
    assert_eq!(says(&gpu.host.post("/v1/completions", &ask("more", 2))).0, "more:f16@cpu");
    assert_eq!(gpu.host.get("/ready").body["degraded"], json!(["replica more:f16@cuda:0"]));
}

#[test]
fn what_is_configured_for_a_replica_that_a_device_does_not_hold_is_kept_for_another_time() {
    let models = folder();
    let start = ("[\"cuda:0\", \"cpu\"]", "", models.path());
    let labels = "[replicas.\"mini:f16@cuda:0\".labels]\nzone = \"a\"";
    let Some(gpu) = Beside::start_with(start, "1", (labels, "taken 0 1073741824")) else { return };
    assert_eq!(says(&gpu.host.post("/v1/completions", &ask("mini", 2))).0, "mini:f16@cpu");
    assert_eq!(gpu.host.get("/ready").body["degraded"], json!(["replica mini:f16@cuda:0"]));
}

#[test]
fn a_device_that_is_lost_leaves_its_requests_to_the_others() {
    let models = folder();
    let Some(gpu) = Beside::start("[\"cuda:0\", \"cuda:1\"]", "max_context = 256", models.path(), "2") else { return };
    // Two at a time have a device each.
    let both = std::thread::scope(|scope| {
        let asks = [(); 2].map(|()| scope.spawn(|| says(&gpu.host.post("/v1/completions", &ask("mini", 12)))));
        asks.map(|asked| asked.join().expect("an answer"))
    });
    let mut on = both.each_ref().map(|(on, _)| &**on);
    on.sort_unstable();
    assert_eq!((on, &both[0].1), (["mini:f16@cuda:0", "mini:f16@cuda:1"], &both[1].1));
    gpu.happens("lost 0");
    // Whoever meets it is told so, or goes on elsewhere.
    let is_down = looks().any(|_| {
        let answer = gpu.host.post("/v1/completions", &ask("mini", 1));
        assert!(answer.status == 200 || answer.body["error"]["code"] == "no_replica", "{answer:?}");
        gpu.device("cuda:0")["state"] == "down"
    });
    assert!(is_down, "nobody noticed");
    for _ in 0..3 {
        assert_eq!(says(&gpu.host.post("/v1/completions", &ask("mini", 1))).0, "mini:f16@cuda:1");
    }
    let (health, lost) = (gpu.host.get("/health"), gpu.device("cuda:0"));
    assert_eq!((&health.body["degraded"], &lost["memory"]["weights"]), (&json!(["device cuda:0"]), &json!(0)));
    assert!(gpu.host.log().contains("this device serves no more"));
}
