//! The command line, as a value. What each command does lives elsewhere: `serve.rs`, `client.rs` and `plugin/`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use pointsman_control::{Budget, SlotName};
use ureq::tls::RootCerts;

use crate::bench::Shape;
use crate::gpu_check::{KernelType, Section};
use crate::keys::KeyCommand;
use crate::oci::certificates;
use crate::plugin::{Kind, Lang};
use crate::rollouts::Subject;

/// An LLM inference host whose routing, scheduling and telemetry policies are hot-swappable WebAssembly components.
#[derive(Debug, Parser)]
#[command(
    name = "pointsman",
    version,
    about,
    after_help = "Without a command: `pointsman serve`, the embedded demo model on 127.0.0.1:8080."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve models (the default).
    #[command(after_help = "Example:\n  pointsman serve --model llama=./my-model --listen 127.0.0.1:9000")]
    Serve(ServeArgs),
    /// Upload, activate and roll back policies on a running host.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Show and set which variants stand behind a model's name.
    #[command(subcommand)]
    Alias(AliasCommand),
    /// Load and unload models of a running host.
    #[command(subcommand)]
    Model(ModelCommand),
    /// Show the devices of a running host, and give back what caches and KV pools have of them.
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Make API keys of the data plane; needs no running host.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Show and clear the response cache of a running host.
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Make, build, check and time a policy; needs no running host.
    #[command(subcommand)]
    Plugin(PluginCommand),
    /// Make slots, aliases and rollouts of a running host what a file says: shows the plan, checks all of it, applies it or
    /// changes nothing.
    #[command(after_help = "Examples:\n  pointsman apply -f host.toml --dry-run\n  pointsman apply -f host.json")]
    Apply(ApplyArgs),
    /// Put load on a server that speaks OpenAI's HTTP: latencies, throughput, goodput and rejections as its clients see them.
    #[command(
        after_help = "Examples:\n  pointsman bench --concurrency 32 --requests 1000 --shape 128:64\n  pointsman bench --url http://10.0.0.7:8080 --model llama --rate 20 --seconds 60 --shape chat --json"
    )]
    Bench(Box<BenchArgs>),
    /// Examine what a configuration asks for without serving it: machine, devices, models, policies, data directory, ports.
    #[command(
        after_help = "Takes the flags of `serve`; changes nothing, and a host may be running. Exit code 1: a fault.\n\nExamples:\n  pointsman doctor --config pointsman.toml\n  pointsman doctor --model llama=./my-model --json"
    )]
    Doctor(Box<DoctorArgs>),
    /// Check a GPU: compare it with the CPU on small random models, measure decoding, and see that memory comes back.
    #[command(
        after_help = "Examples:\n  pointsman gpu-check --json result.json\n  pointsman gpu-check --gpu 1 --only kernels,parity\n  compute-sanitizer pointsman gpu-check --only kernels,parity --small"
    )]
    GpuCheck(GpuCheckArgs),
    /// Compile a component on standard input; used by the host itself, in a limited child process.
    #[command(name = "__compile", hide = true)]
    Compile,
}

/// Flags of `serve`; they override the environment, which overrides the file.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ServeArgs {
    /// Configuration file (TOML; pointsman.example.toml lists every key).
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Address of the data plane [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// Address of the admin plane [default: 127.0.0.1:8081].
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<SocketAddr>,
    /// A model to serve besides the demo: a folder with config.json, safetensors and tokenizer.json, or a .gguf file.
    #[arg(long, value_name = "[NAME=]PATH")]
    pub(crate) model: Vec<String>,
    /// Device to serve on: cpu, cuda:N, auto for the GPUs that there are, or null[:US] to compute nothing and measure the
    /// host; several give each variant a replica on each [default: cpu]. Serving on a GPU is new and has not been run on one yet.
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Vec<String>,
    /// Folder with NVIDIA's libraries, looked at before the usual ones.
    #[arg(long, value_name = "DIR")]
    pub(crate) cuda_lib_dir: Vec<PathBuf>,
    /// How the weights of models other than the demo are kept: f16 (as they are stored), q8_0, or, on GPUs alone, fp8;
    /// several make a variant each, MODEL:PRECISION [default: f16].
    #[arg(long, value_name = "PRECISION")]
    pub(crate) precision: Vec<String>,
    /// Where deployments, components and the journal live [default: $XDG_DATA_HOME/pointsman].
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Native policies only; stored deployments are left as they are.
    #[arg(long)]
    pub safe_mode: bool,
}

/// Flags of `bench`.
#[derive(Clone, Debug, Args)]
pub(crate) struct BenchArgs {
    /// Base URL of the server.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080", env = "POINTSMAN_URL")]
    pub(crate) url: String,
    /// API key of the server.
    #[arg(long, value_name = "KEY", env = "POINTSMAN_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Model to ask [default: the first that the server lists].
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Closed loop: clients that ask again as soon as they are answered.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) concurrency: u32,
    /// Open loop instead: requests a second on average, exponential times in between, whatever the server does.
    #[arg(long, value_name = "PER_S", conflicts_with = "concurrency", value_parser = rate)]
    pub(crate) rate: Option<f64>,
    /// Open loop: most requests under way; those beyond are counted as failed.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) max_in_flight: u32,
    /// Requests to send.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub(crate) requests: u64,
    /// End after this time even if there are requests left.
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) seconds: Option<u64>,
    /// Requests before the first that counts.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub(crate) warm_up: u32,
    /// Tokens of prompts and answers: IN:OUT, ranges as in 100-200:16-64, or `chat` (long-tailed, as conversations are).
    #[arg(long, value_name = "SHAPE", default_value = "128:64")]
    pub(crate) shape: Shape,
    /// Tokens with which every prompt begins, the same for all.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub(crate) prefix_tokens: u32,
    /// Ask /v1/chat/completions instead of /v1/completions.
    #[arg(long)]
    pub(crate) chat: bool,
    /// Ask for whole answers instead of streams.
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Lengths, prompts and arrivals are a function of it.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Goodput counts requests whose first token came within this time ...
    #[arg(long, value_name = "MS", default_value_t = 1_000)]
    pub(crate) slo_ttft_ms: u64,
    /// ... and whose tokens after it came this fast on average.
    #[arg(long, value_name = "MS", default_value_t = 50)]
    pub(crate) slo_tpot_ms: u64,
    /// A request that takes longer has failed.
    #[arg(long, value_name = "S", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout_s: u64,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Flags of `doctor`.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// Print JSON instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Flags of `gpu-check`.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct GpuCheckArgs {
    /// The N of cuda:N.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) gpu: u32,
    /// Write the results here too.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// These parts alone, in the order in which they stand here [default: all].
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART")]
    pub(crate) only: Vec<Section>,
    /// Of the parts `kernels` and `parity`, what computes in these types, or without one, alone [default: all].
    #[arg(long, value_enum, value_delimiter = ',', value_name = "TYPE")]
    pub(crate) of: Vec<KernelType>,
    /// Pass over a kernel: one fault takes the device from the whole process, and with it what comes after.
    #[arg(long, value_delimiter = ',', value_name = "KERNEL")]
    pub(crate) skip: Vec<String>,
    /// Start no kernel before the end of the one before it: for what is left when such launches take the device.
    #[arg(long)]
    pub(crate) no_overlap: bool,
    /// Few cases of each kernel, with an allocation for each of their buffers, and few comparisons: for NVIDIA's memory checker.
    #[arg(long)]
    pub(crate) small: bool,
    /// Time for each part. Comparisons that there is no time for count as failed, figures are left out.
    #[arg(long, value_name = "SECONDS", default_value_t = 150)]
    pub(crate) budget: u64,
    /// Python with PyTorch, whose decode loop is measured beside ours [default: python3].
    #[arg(long, value_name = "PYTHON")]
    pub(crate) peers: Option<PathBuf>,
    /// Folder with NVIDIA's libraries, looked at before the usual ones.
    #[arg(long, value_name = "DIR")]
    pub(crate) cuda_lib_dir: Vec<PathBuf>,
    /// Take the kernels from the text in the binary, as a machine without NVRTC does.
    #[arg(long)]
    pub(crate) ptx: bool,
    /// Where compiled kernels are kept from one run to the next [default: in the folder for temporary files].
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceCommand {
    /// Say what each has, and what holds it.
    #[command(after_help = "Example:\n  pointsman device list")]
    List {
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Empty the prefix caches of a device; running requests keep what they hold.
    #[command(after_help = "Example:\n  pointsman device clear-cache cuda:0")]
    ClearCache {
        /// As in `cpu` or `cuda:0`.
        device: String,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Bound the KV pools of a GPU while it serves; requests in the way of a smaller one are computed again.
    #[command(
        after_help = "Examples:\n  pointsman device kv-pools cuda:0 --mib 8192\n  pointsman device kv-pools cuda:0 --unbounded"
    )]
    KvPools {
        /// As in `cuda:0`.
        device: String,
        #[command(flatten)]
        bound: PoolBound,
        #[command(flatten)]
        at: AdminArgs,
    },
}

/// How large pools may be.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct PoolBound {
    /// Most MiB of each; one full context is kept at least.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    pub(crate) mib: Option<u64>,
    /// No bound: all that they were made with, as far as there is room.
    #[arg(long)]
    pub(crate) unbounded: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// Say how much is kept, and how often it served.
    #[command(after_help = "Example:\n  pointsman cache status")]
    Status {
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Forget every answer; those being computed are not kept either.
    #[command(after_help = "Example:\n  pointsman cache clear")]
    Clear {
        #[command(flatten)]
        at: AdminArgs,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Validate, compile and store a component; prints its digest.
    #[command(
        after_help = "Examples:\n  pointsman policy upload my_router.wasm\n  pointsman policy upload my_router.wasm --signature my_router.wasm.sig\n  pointsman policy upload oci://ghcr.io/acme/my-router:1.2"
    )]
    Upload {
        /// A component, a core module that carries its component type, or an `oci://` reference that the host pulls.
        file: String,
        /// Detached signature [default: FILE.sig where it exists].
        #[arg(long, value_name = "FILE")]
        signature: Option<PathBuf>,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// List components, who signed them and the slots that use them.
    #[command(after_help = "Example:\n  pointsman policy list")]
    List {
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Make a component active in a slot.
    #[command(
        after_help = "Examples:\n  pointsman policy activate router sha256:2c26...\n  pointsman policy activate router my_router.wasm --set '{\"bias\": 2}'\n  pointsman policy activate scheduler native"
    )]
    Activate {
        /// admission, router, scheduler, kv-retention, sampler or telemetry.NAME.
        slot: SlotName,
        /// A digest (or a unique beginning of one), the name of a built-in, a file to upload first, an `oci://` reference, or
        /// `native`; `@sha256:...` pins a name.
        component: String,
        /// JSON handed to the component's `init`.
        #[arg(long = "set", value_name = "JSON", default_value = "{}", value_parser = json)]
        config: serde_json::Value,
        /// Only if this generation is active.
        #[arg(long, value_name = "GENERATION")]
        if_generation: Option<u64>,
        #[command(flatten)]
        budget: BudgetArgs,
        /// Whether it may start without what the active policy knows.
        #[arg(long, value_enum, default_value_t)]
        handover: HandoverArg,
        /// Of a sampler: what becomes of requests of which it says nothing, because it has faulted.
        #[arg(long, value_enum, default_value_t)]
        on_fault: OnFaultArg,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Return a slot to the policy that was active before.
    #[command(after_help = "Example:\n  pointsman policy rollback router")]
    Rollback {
        /// admission, router, scheduler, kv-retention, sampler or telemetry.NAME.
        slot: SlotName,
        /// Only if this generation is active.
        #[arg(long, value_name = "GENERATION")]
        if_generation: Option<u64>,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Return a slot to the native policy; removes a telemetry slot.
    #[command(after_help = "Example:\n  pointsman policy remove telemetry.mine")]
    Remove {
        /// admission, router, scheduler, kv-retention, sampler or telemetry.NAME.
        slot: SlotName,
        /// Only if this generation is active.
        #[arg(long, value_name = "GENERATION")]
        if_generation: Option<u64>,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Delete an uploaded component that no slot uses.
    #[command(after_help = "Example:\n  pointsman policy delete sha256:2c26...")]
    Delete {
        /// A digest, or a unique beginning of one.
        component: String,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Print who changed what, when and why: a JSON object per line.
    #[command(
        after_help = "Examples:\n  pointsman policy journal | tail -n 5\n  pointsman policy journal --after 120 --follow"
    )]
    Journal {
        /// Lines with a higher sequence number.
        #[arg(long, value_name = "SEQUENCE", default_value_t = 0)]
        after: u64,
        /// Go on with what happens from now on.
        #[arg(long)]
        follow: bool,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Try a policy on a share of the time, or a variant on a share of the requests, measure it, and take it back when it
    /// harms.
    #[command(subcommand)]
    Rollout(RolloutCommand),
    /// Make the native policy decide in every slot with one switch, and let the policies answer again.
    #[command(
        after_help = "Examples:\n  pointsman policy safe-mode on --reason 'the new router loops'\n  pointsman policy safe-mode off\n  pointsman policy safe-mode     # says which"
    )]
    SafeMode {
        /// on or off; without it, says which.
        switch: Option<Switch>,
        /// Why, for the journal and for whoever looks at the slots.
        #[arg(long, value_name = "TEXT", requires = "switch")]
        reason: Option<String>,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Say why a request went where it went: what the router saw and said, what the host did, and when.
    #[command(
        after_help = "Examples:\n  pointsman policy explain chatcmpl-0011aabb\n  pointsman policy explain     # lists the last requests"
    )]
    Explain {
        /// `x-request-id` of the response; without it the last requests are listed.
        #[arg(value_name = "ID", value_parser = request_id)]
        id: Option<String>,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Record what a slot decides, and on what, for `pointsman plugin run`.
    #[command(after_help = "Example:\n  pointsman policy record router --limit 500 --seconds 30 -o traffic.jsonl")]
    Record {
        /// admission, router, scheduler, kv-retention or sampler.
        slot: SlotName,
        /// Most decisions.
        #[arg(long, value_name = "N", default_value_t = 1_000)]
        limit: u64,
        /// Longest time.
        #[arg(long, value_name = "S", default_value_t = 60)]
        seconds: u64,
        /// File to write; it is replaced.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Make a key that signs components; prints the line for `[trust.keys]`.
    #[command(after_help = "Example:\n  pointsman policy keygen release.key")]
    Keygen {
        /// Where the secret half goes: a new file that only its owner can read.
        file: PathBuf,
    },
    /// Sign a component; writes FILE.sig, which `upload` takes.
    #[command(after_help = "Example:\n  pointsman policy sign my_router.wasm --key release.key")]
    Sign {
        /// The component, exactly as it will be uploaded.
        file: PathBuf,
        /// A secret key of `pointsman policy keygen`.
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
    },
    /// Show what is active in every slot, its health and its counters.
    #[command(after_help = "Example:\n  pointsman policy status")]
    Status {
        #[command(flatten)]
        at: AdminArgs,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum RolloutCommand {
    /// Start a rollout.
    #[command(
        after_help = "Examples:\n  pointsman policy rollout start router my_router.wasm --mode canary\n  pointsman policy rollout start scheduler sched-priority --mode switchback --auto-promote\n  pointsman policy rollout start router my_router.wasm --mode shadow --sample 0.5\n  pointsman policy rollout start router route-weighted --mode canary --steps 10,50,100 \\\n      --plan '{\"block_ms\": 10000, \"guards\": [{\"metric\": \"ttft-over-slo\", \"margin\": 0.02}]}'\n  pointsman policy rollout start alias.demo demo:q8_0 --mode canary --plan '{\"sticky\": \"tenant\"}'"
    )]
    Start(Box<StartArgs>),
    /// Show a rollout's report, or the last rollout of every slot and alias.
    #[command(
        after_help = "Examples:\n  pointsman policy rollout status\n  pointsman policy rollout status router-7\n  pointsman policy rollout status alias.demo"
    )]
    Status {
        /// A rollout, a slot or `alias.NAME`.
        #[arg(value_name = "ID|SLOT")]
        of: Option<String>,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Make the candidate active for good, or take the next step.
    #[command(
        after_help = "Examples:\n  pointsman policy rollout promote router-7\n  pointsman policy rollout promote router-7 --step"
    )]
    Promote {
        /// As `start` and `status` print it.
        id: String,
        /// Only the next step.
        #[arg(long)]
        step: bool,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Return to what served before, for good.
    #[command(after_help = "Example:\n  pointsman policy rollout abort router-7")]
    Abort {
        /// As `start` and `status` print it.
        id: String,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Let what served before serve until the rollout is resumed.
    #[command(after_help = "Example:\n  pointsman policy rollout pause router-7")]
    Pause {
        /// As `start` and `status` print it.
        id: String,
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Go on with the evidence so far.
    #[command(after_help = "Example:\n  pointsman policy rollout resume router-7")]
    Resume {
        /// As `start` and `status` print it.
        id: String,
        #[command(flatten)]
        at: AdminArgs,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum AliasCommand {
    /// Show every alias with its variants and weights.
    #[command(after_help = "Example:\n  pointsman alias list")]
    List {
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Assign requests of an alias to its variants by weight.
    #[command(
        after_help = "Examples:\n  pointsman alias set demo demo:f16=90 demo:q8_0=10 --sticky tenant\n  pointsman alias set demo --router"
    )]
    Set {
        /// The model's name.
        alias: String,
        /// Weight of a variant, 0 to 10000; one that is not named gets none.
        #[arg(value_name = "VARIANT=WEIGHT", value_parser = weight, required_unless_present = "router")]
        weights: Vec<(String, u32)>,
        /// No weights: the router chooses.
        #[arg(long, conflicts_with = "weights")]
        router: bool,
        /// What stays at one variant.
        #[arg(long, value_parser = ["tenant", "session", "request"], default_value = "session")]
        sticky: String,
        /// Only if this generation is active.
        #[arg(long, value_name = "GENERATION")]
        if_generation: Option<u64>,
        #[command(flatten)]
        at: AdminArgs,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Show every model: how it is, where it is, what it takes.
    #[command(after_help = "Example:\n  pointsman model list")]
    List {
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Load a model beside those that are served; shows the progress, and ends when it is served.
    #[command(
        after_help = "Examples:\n  pointsman model load llama=/models/llama-3.2-1b\n  pointsman model load llama:v2=/models/llama-tuned.gguf     # another variant of llama; `pointsman alias set` gives it traffic"
    )]
    Load {
        /// What it is called, and its folder or .gguf file on the host's machine, below one of engine.model_dirs.
        #[arg(value_name = "NAME=PATH", value_parser = named_path)]
        model: (String, PathBuf),
        #[command(flatten)]
        at: AdminArgs,
    },
    /// Unload a model: it takes no more requests, those that it has may finish, and its memory is free after that.
    #[command(after_help = "Example:\n  pointsman model unload llama:v2 --grace-s 60")]
    Unload {
        /// As `list` shows it.
        name: String,
        /// Longest time for requests that run; those left are ended [default: server.shutdown_grace_ms].
        #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(0..=3_600))]
        grace_s: Option<u64>,
        #[command(flatten)]
        at: AdminArgs,
    },
}

/// What a rollout is started with.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// admission, router, scheduler, kv-retention, sampler, or alias.NAME.
    #[arg(value_name = "SLOT")]
    pub subject: Subject,
    /// A digest (or a unique beginning of one), the name of a built-in, a file to upload first, or `native`; of an alias, one
    /// of its variants.
    #[arg(value_name = "COMPONENT")]
    pub candidate: String,
    /// How candidate and control are compared: canary, switchback or shadow; of an alias, canary or ab.
    #[arg(long, value_name = "MODE")]
    pub mode: String,
    /// JSON handed to the component's `init` [default: {}].
    #[arg(long = "set", value_name = "JSON", value_parser = json)]
    pub config: Option<serde_json::Value>,
    /// Percent of the candidate, ascending [default: 1,5,10,25,50,100].
    #[arg(long, value_name = "PERCENT", value_delimiter = ',')]
    pub steps: Vec<u8>,
    /// Share of the decisions that are put to a shadow, above 0 and at most 1 [default: 0.1].
    #[arg(long, value_name = "SHARE")]
    pub sample: Option<f64>,
    /// Go to the next step, and make the candidate active at the end, without asking.
    #[arg(long)]
    pub auto_promote: bool,
    /// Other members of the plan, as in docs/rollouts.md.
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = json)]
    pub plan: serde_json::Value,
    #[command(flatten)]
    pub at: AdminArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PluginCommand {
    /// Make a folder with a working policy, its build recipe and the package it implements.
    #[command(
        after_help = "Examples:\n  pointsman plugin new my-router --kind router --lang rust\n  pointsman plugin new my-sampler --kind sampler --lang js"
    )]
    New {
        /// Folder to make; its last part is the policy's name.
        name: PathBuf,
        /// What it decides.
        #[arg(long)]
        kind: Kind,
        /// What it is written in.
        #[arg(long)]
        lang: Lang,
    },
    /// Build a plugin folder into NAME.wasm and check it.
    #[command(after_help = "Example:\n  pointsman plugin build my-router")]
    Build {
        /// The folder.
        path: PathBuf,
        #[command(flatten)]
        with: TrialArgs,
    },
    /// Say whether the host would take a component, and if not, why and what to change.
    #[command(
        after_help = "Examples:\n  pointsman plugin check my-router\n  pointsman plugin check my_router.wasm --config '{\"bias\": 2}'"
    )]
    Check {
        /// A plugin folder, a component, or a core module that carries its component type.
        path: PathBuf,
        #[command(flatten)]
        with: TrialArgs,
    },
    /// Time the calls of a component beside the host's own policy.
    #[command(after_help = "Example:\n  pointsman plugin bench my-router")]
    Bench {
        /// A plugin folder or a component.
        path: PathBuf,
        #[command(flatten)]
        with: TrialArgs,
        /// Most calls for each row of the table.
        #[arg(long, value_name = "N", default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
        calls: u32,
    },
    /// Run a policy on recorded inputs and show its decisions beside those of another.
    #[command(
        after_help = "Examples:\n  pointsman policy record router --limit 500 -o traffic.jsonl\n  pointsman plugin run my-router traffic.jsonl --against native"
    )]
    Run {
        /// A plugin folder or a component.
        path: PathBuf,
        /// What `pointsman policy record` wrote.
        input: PathBuf,
        #[command(flatten)]
        with: TrialArgs,
        /// What to compare with: `recorded`, `native` or a component.
        #[arg(long, value_name = "recorded|native|FILE", default_value = "recorded")]
        against: String,
        /// Print JSON lines instead of a table.
        #[arg(long)]
        json: bool,
    },
}

/// What a policy is tried out with.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct TrialArgs {
    /// JSON handed to the component's `init`.
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = json)]
    pub config: serde_json::Value,
    /// A label of replicas that the host has in its configuration; `manifest.wants` may name it. Repeatable.
    #[arg(long = "label", value_name = "NAME")]
    pub labels: Vec<String>,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

/// Flags of `apply`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ApplyArgs {
    /// TOML, or JSON where the name ends in .json: `[slots.NAME]` with component, config, state_namespace, budget,
    /// handover and on_fault, `[aliases.NAME]` with weights and sticky, `[rollouts.SLOT]` and `[rollouts."alias.NAME"]` (docs/operate.md).
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// Show what would change, and change nothing.
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub at: AdminArgs,
}

/// Limits that a policy has of its own.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct BudgetArgs {
    /// Time of a decision beyond which it is counted, in microseconds.
    #[arg(long, value_name = "US")]
    pub soft_us: Option<u64>,
    /// Time of a decision at which it is stopped, in milliseconds.
    #[arg(long, value_name = "MS")]
    pub hard_ms: Option<u64>,
    /// Memory of an instance, in MiB.
    #[arg(long, value_name = "MIB")]
    pub memory_mib: Option<u64>,
}

impl BudgetArgs {
    pub(crate) fn into_budget(self) -> Budget {
        let Self { soft_us, hard_ms, memory_mib } = self;
        Budget { soft_us, hard_ms, memory_mib }
    }
}

/// Whether a policy may start cold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum HandoverArg {
    /// Where nothing can be handed over it starts without.
    #[default]
    Cold,
    /// It is refused then.
    Require,
}

impl HandoverArg {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Require => "require",
        }
    }
}

/// Whether requests go on without a sampler that faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum OnFaultArg {
    /// They go on.
    #[default]
    Open,
    /// They are ended with an error.
    Closed,
}

impl OnFaultArg {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Closed => "closed",
        }
    }
}

/// Where the admin API is.
#[derive(Clone, Debug, Args)]
pub(crate) struct AdminArgs {
    /// Base URL of the admin API.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8081", env = "POINTSMAN_ADMIN_URL")]
    pub url: String,
    /// PEM file with the certificates to trust where the URL is https:// [default: those of the system].
    #[arg(long, value_name = "FILE", env = "POINTSMAN_ADMIN_CA_FILE", value_parser = trusted)]
    pub ca_file: Option<RootCerts>,
    /// Bearer token of the admin API.
    #[arg(long, value_name = "TOKEN", env = "POINTSMAN_ADMIN_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// Print the API's JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// The certificates of a file.
fn trusted(path: &str) -> Result<RootCerts, String> {
    let pem = std::fs::read(path).map_err(|error| error.to_string())?;
    certificates(&pem).ok_or_else(|| "it holds no certificate in PEM".to_owned())
}

/// What a request may be called, so that it can stand in a path.
fn request_id(text: &str) -> Result<String, String> {
    let good = text.bytes().all(|b| b.is_ascii_graphic() && !b"/?#%".contains(&b));
    if good && !text.is_empty() { Ok(text.to_owned()) } else { Err("not a request id".to_owned()) }
}

fn weight(text: &str) -> Result<(String, u32), String> {
    // The last one: a variant may have a `=` in its name.
    let (variant, weight) = text.rsplit_once('=').ok_or("expected VARIANT=WEIGHT, as in demo:f16=90")?;
    let weight = weight.parse().map_err(|_| format!("`{weight}` is not a weight: an integer of 0 to 10000"))?;
    Ok((variant.to_owned(), weight))
}

fn named_path(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("expected NAME=PATH, as in llama=/models/llama")?;
    // On the same machine a path means what it does in this folder.
    let real = std::fs::canonicalize(path).or_else(|_| std::path::absolute(path));
    let path = real.map_err(|error| format!("`{path}` is not a path: {error}"))?;
    Ok((name.to_owned(), path))
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| (1e-3..=1e6).contains(rate));
    rate.ok_or_else(|| "expected requests a second, 0.001 to 1000000".to_owned())
}

fn json(text: &str) -> Result<serde_json::Value, String> {
    serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))
}
