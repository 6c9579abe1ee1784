//! What an upload is, before anything of it is compiled or run: its digest, its world, the version of the package it was
//! built against, and the reasons to refuse it.
//!
//! Reads names only, with wasmparser; types are checked later by wasmtime itself. Every refusal says what was found and what
//! to do about it, because its reader is the policy's author.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use wasmparser::{Encoding, Parser, Payload};

use crate::compile::CompileError;
use crate::versions::{BOUND, HANDOVER, Interface, LIFECYCLE, Minor, PACKAGE};

/// Interfaces of the package that a guest may import; `types` has no functions.
const IMPORTS: &[&str] = &["types", "host-log", "host-metrics", "host-state"];
/// Most import names listed in a refusal.
const MAX_NAMES: usize = 16;

/// Which hook a component implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum World {
    /// `admission-policy`.
    Admission,
    /// `router-policy`.
    Router,
    /// `scheduler-policy`.
    Scheduler,
    /// `telemetry-hook`.
    Telemetry,
    /// `kv-retention-policy`.
    Retention,
    /// `sampler-policy`.
    Sampler,
}

/// Identity of uploaded bytes: `sha256:<hex>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(Arc<str>);

/// Why an upload was refused.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// Over the size cap.
    #[error("the upload has {size} bytes and the limit is {limit}; strip debug sections or raise `max_upload_bytes`")]
    TooLarge {
        /// Its size.
        size: usize,
        /// The cap.
        limit: usize,
    },
    /// Not WebAssembly at all.
    #[error("this is not a WebAssembly binary but {found}; {advice}")]
    NotWasm {
        /// What it looks like.
        found: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// A core module that does not say which world it implements.
    #[error(
        "this is a core module without a component type: build it with the SDK (wit-bindgen), or turn it into a component \
         with `wasm-tools component embed` and `wasm-tools component new`"
    )]
    PlainModule,
    /// WebAssembly that does not parse or validate.
    #[error("the component is malformed: {detail}; rebuild it")]
    Malformed {
        /// Where and why.
        detail: String,
    },
    /// Imports that no policy may have.
    #[error(
        "the component imports {}, and a policy may import only pointsman:policy/host-log, host-metrics and host-state: it \
         has no files, sockets, clock or randomness; build for wasm32-unknown-unknown, or stub WASI out (JavaScript: \
         --backend-qjs-stub-wasi, Python: --stub-wasi)", .names.join(", ")
    )]
    ForeignImports {
        /// Their names.
        names: Vec<String>,
    },
    /// Built against another version of the package.
    #[error(
        "the component was built against pointsman:policy@{found}; this host binds {BOUND}; rebuild it against one of them"
    )]
    Version {
        /// The version that it names.
        found: String,
    },
    /// Names interfaces of more than one minor version.
    #[error(
        "the component names interfaces of pointsman:policy@{one} and @{other}; build all its parts against one of them"
    )]
    MixedVersions {
        /// One of the versions.
        one: String,
        /// Another one.
        other: String,
    },
    /// Exports that are none of the worlds.
    #[error(
        "the component implements none of the worlds {} of pointsman:policy@{BOUND}: it exports {}", World::names(), if .exports.is_empty() { "nothing".to_owned() } else { .exports.join(", ") }
    )]
    UnknownWorld {
        /// What it exports.
        exports: Vec<String>,
    },
    /// It would hand over, and its world has no instance that could be asked.
    #[error(
        "the component exports pointsman:policy/handover besides {}: several of its instances answer at once and none sees \
         every request, so there is none to take a snapshot of; keep what must outlive a swap in host-state, and leave the \
         export out", .world.interface()
    )]
    Handover {
        /// Its world.
        world: World,
    },
    /// Its types are not those of the package, or it cannot be instantiated.
    #[error("the component does not fit this host: {detail}; rebuild it against this host's wit/policy.wit")]
    Link {
        /// Where and why.
        detail: String,
    },
    /// The bytes are not those that the digest names: the store is damaged.
    #[error("the stored component {expected} has the digest {found}; restore it or upload it again")]
    WrongDigest {
        /// The digest by which it was asked for.
        expected: Digest,
        /// The digest that it has.
        found: Digest,
    },
    /// The compilation failed or was refused.
    #[error(transparent)]
    Compile(#[from] CompileError),
}

/// What the names in a component say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) world: World,
    /// Whether it exports `handover` besides.
    pub(crate) hands_over: bool,
    /// As in `pointsman:policy@0.1.0`.
    pub(crate) package: Arc<str>,
    /// Where names have the digit of an older minor version, for [`crate::versions::lift`].
    pub(crate) outdated_digits: Vec<usize>,
    /// Names of the interfaces that it imports.
    pub(crate) imports: Vec<String>,
}

/// A component for what a guest's toolchain made: a core module that carries its component type is encoded, a component
/// is what it was.
///
/// # Errors
/// It is neither.
pub fn encode(bytes: &[u8]) -> Result<Vec<u8>, UploadError> {
    to_component(bytes, usize::MAX).map(Cow::into_owned)
}

/// Checks size and kind and returns the bytes as a component, encoding a core module that carries its component type.
pub(crate) fn to_component(bytes: &[u8], limit: usize) -> Result<Cow<'_, [u8]>, UploadError> {
    if bytes.len() > limit {
        return Err(UploadError::TooLarge { size: bytes.len(), limit });
    }
    match bytes {
        [0, b'a', b's', b'm', 0x0d, 0, 1, 0, ..] => Ok(bytes.into()),
        [0, b'a', b's', b'm', 1, 0, 0, 0, ..] => encode_module(bytes).map(Into::into),
        [0, b'a', b's', b'm', ..] => Err(UploadError::NotWasm {
            found: "a WebAssembly binary of an unknown version",
            advice: "build it with a current toolchain",
        }),
        _ => Err(not_wasm(bytes)),
    }
}

fn encode_module(bytes: &[u8]) -> Result<Vec<u8>, UploadError> {
    // The encoder would make an empty component of a module that says nothing of itself.
    let says_type = |payload: &Payload<'_>| matches!(payload, Payload::CustomSection(section) if section.name().starts_with("component-type"));
    if !Parser::new(0).parse_all(bytes).filter_map(Result::ok).any(|payload| says_type(&payload)) {
        return Err(UploadError::PlainModule);
    }
    // The encoder is made for a compiler's output and may panic on what a stranger made up.
    let encoded = std::panic::catch_unwind(|| {
        wit_component::ComponentEncoder::default().validate(true).module(bytes).and_then(|mut e| e.encode())
    });
    let detail = match encoded {
        Ok(Ok(component)) => return Ok(component),
        Ok(Err(error)) => shorten(&format!("{error:#}")),
        Err(_) => "its component type cannot be read".to_owned(),
    };
    Err(UploadError::Malformed { detail })
}

fn not_wasm(bytes: &[u8]) -> UploadError {
    let rebuild = "upload the .wasm file that the guest toolchain writes";
    let (found, advice) = match bytes {
        [] => ("an empty body", rebuild),
        [0x7f, b'E', b'L', b'F', ..] => {
            ("a native ELF file", "build it for wasm32-unknown-unknown and upload the .wasm file")
        }
        [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd, ..] | [b'P', b'K', 3, 4, ..] => {
            ("a compressed file", "unpack it and upload the .wasm file")
        }
        _ => match std::str::from_utf8(bytes).map(str::trim_start) {
            Ok(text) if text.starts_with('(') || text.starts_with(";;") => {
                ("WebAssembly text", "assemble it with `wasm-tools parse file.wat -o file.wasm`")
            }
            Ok(_) => ("a text file", rebuild),
            Err(_) => ("an unknown binary file", rebuild),
        },
    };
    UploadError::NotWasm { found, advice }
}

/// Reads a component's world and package version from the names of its imports and exports.
pub(crate) fn identify(component: &[u8]) -> Result<Identity, UploadError> {
    let (imports, exports) =
        top_level_names(component).map_err(|error| UploadError::Malformed { detail: shorten(&error.to_string()) })?;
    let foreign: Vec<String> =
        imports.iter().filter(|name| !may_import(name)).take(MAX_NAMES).map(|&name| name.to_owned()).collect();
    if !foreign.is_empty() {
        return Err(UploadError::ForeignImports { names: foreign });
    }
    let interfaces: Vec<Interface<'_>> =
        imports.iter().chain(&exports).filter_map(|name| Interface::parse(name)).collect();
    if let Some(unknown) = interfaces.iter().find(|interface| interface.minor().is_none()) {
        return Err(UploadError::Version { found: unknown.version.to_owned() });
    }
    if let Some([one, other]) = interfaces.array_windows().find(|[one, other]| one.minor() != other.minor()) {
        return Err(UploadError::MixedVersions { one: one.version.to_owned(), other: other.version.to_owned() });
    }
    let exported =
        |wanted: &str| exports.iter().filter_map(|name| Interface::parse(name)).find(|found| found.name == wanted);
    let hands_over = exported(HANDOVER).is_some();
    let implements = |world: &World| exported(world.interface()).is_some_and(|i| i.minor() >= Some(world.since()));
    let mut found = World::ALL.into_iter().filter(implements);
    match (found.next(), found.next(), exported(LIFECYCLE)) {
        (Some(world), None, Some(_)) if hands_over && !world.may_hand_over() => Err(UploadError::Handover { world }),
        (Some(world), None, Some(lifecycle)) => Ok(Identity {
            world,
            hands_over,
            package: format!("{PACKAGE}@{}", lifecycle.version).into(),
            outdated_digits: interfaces.iter().filter_map(|i| i.outdated_digit(component)).collect(),
            imports: imports.iter().map(|name| (*name).to_owned()).collect(),
        }),
        _ => {
            Err(UploadError::UnknownWorld { exports: exports.into_iter().take(MAX_NAMES).map(str::to_owned).collect() })
        }
    }
}

/// Names of the outermost component's imports and exports.
fn top_level_names(component: &[u8]) -> Result<(Vec<&str>, Vec<&str>), wasmparser::BinaryReaderError> {
    let (mut imports, mut exports) = (Vec::new(), Vec::new());
    let mut depth = 0_u32;
    for payload in Parser::new(0).parse_all(component) {
        match payload? {
            Payload::Version { encoding: Encoding::Component | Encoding::Module, .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::ComponentImportSection(section) if depth == 1 => {
                for import in section {
                    imports.push(import?.name.name);
                }
            }
            Payload::ComponentExportSection(section) if depth == 1 => {
                for export in section {
                    exports.push(export?.name.name);
                }
            }
            _ => {}
        }
    }
    Ok((imports, exports))
}

fn may_import(name: &str) -> bool {
    Interface::parse(name).is_some_and(|interface| IMPORTS.contains(&interface.name))
}

/// Texts of tools, cut to what a person reads.
pub(crate) fn shorten(text: &str) -> String {
    let mut text = text.trim().to_owned();
    crate::fault::truncate(&mut text, 1_024);
    text
}

// === impl Digest ===

impl Digest {
    /// The digest of some bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut text = String::with_capacity(7 + 64);
        text.push_str("sha256:");
        push_hex(&mut text, &Sha256::digest(bytes));
        Self(text.into())
    }

    /// A digest from its text: `sha256:` and 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?;
        let good = hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        good.then(|| Self(text.into()))
    }

    /// The whole text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0[7..]
    }

    /// The first eight of them, as in a revision.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.0[7..15]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    use fmt::Write as _;
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
}

// === impl World ===

impl World {
    /// Every world.
    pub(crate) const ALL: [Self; 6] =
        [Self::Admission, Self::Router, Self::Scheduler, Self::Telemetry, Self::Retention, Self::Sampler];

    /// Its name in the package.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Admission => "admission-policy",
            Self::Router => "router-policy",
            Self::Scheduler => "scheduler-policy",
            Self::Telemetry => "telemetry-hook",
            Self::Retention => "kv-retention-policy",
            Self::Sampler => "sampler-policy",
        }
    }

    /// The interface that it exports beside `lifecycle`.
    fn interface(self) -> &'static str {
        match self {
            Self::Admission => "admission",
            Self::Router => "router",
            Self::Scheduler => "scheduler",
            Self::Telemetry => "telemetry",
            Self::Retention => "kv-retention",
            Self::Sampler => "sampler",
        }
    }

    /// Whether one instance has all calls for a replica, or for the host, and so something to hand over.
    fn may_hand_over(self) -> bool {
        !matches!(self, Self::Admission | Self::Router)
    }

    /// The first minor version of the package that has it.
    fn since(self) -> Minor {
        match self {
            Self::Router | Self::Scheduler | Self::Telemetry => Minor::V0_1,
            Self::Admission | Self::Retention | Self::Sampler => Minor::V0_2,
        }
    }

    /// All names, for error messages.
    fn names() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }

    /// The world of a slot, by the slot's name; `None` for a slot that this host does not have.
    #[must_use]
    pub fn of_slot(slot: &str) -> Option<Self> {
        match slot {
            "admission" => Some(Self::Admission),
            "router" => Some(Self::Router),
            "scheduler" => Some(Self::Scheduler),
            "kv-retention" => Some(Self::Retention),
            "sampler" => Some(Self::Sampler),
            _ => {
                let name = slot.strip_prefix("telemetry.")?;
                let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
                ((1..=40).contains(&name.len()) && name.bytes().all(good)).then_some(Self::Telemetry)
            }
        }
    }
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

// === impl UploadError ===

impl UploadError {
    /// Whether the same upload may succeed later: the host was busy, not the component wrong.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Compile(CompileError::Busy { .. }))
    }

    /// Whether the host is to blame and not the upload.
    #[must_use]
    pub fn is_host_fault(&self) -> bool {
        matches!(self, Self::WrongDigest { .. } | Self::Compile(CompileError::Start { .. } | CompileError::Io { .. }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_text() {
        let digest = Digest::of(b"");
        assert_eq!(digest.as_str(), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!((digest.short(), digest.hex().len()), ("e3b0c442", 64));
        assert_eq!(Digest::parse(digest.as_str()), Some(digest));
        for bad in ["", "sha256:", "sha1:00", "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855"]
        {
            assert_eq!(Digest::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_not_wasm_is_named() {
        for (bytes, found) in [
            (&b""[..], "an empty body"),
            (b"\x7fELF\x02", "a native ELF file"),
            (b"\x1f\x8b\x08", "a compressed file"),
            (b"  (component)", "WebAssembly text"),
            (b";; hi", "WebAssembly text"),
            (b"<html>", "a text file"),
            (b"\xff\xfe\x00", "an unknown binary file"),
            (b"\0asm\x0c\0\x01\0", "a WebAssembly binary of an unknown version"),
        ] {
            match to_component(bytes, 1_000) {
                Err(UploadError::NotWasm { found: f, .. }) => assert_eq!(f, found),
                other => panic!("{bytes:?}: {other:?}"),
            }
        }
        assert!(matches!(to_component(&[0; 9], 8), Err(UploadError::TooLarge { size: 9, limit: 8 })));
    }

    #[test]
    fn components_are_identified_by_names() {
        const OURS: &str = "pointsman:policy/";
        let instance = |name: &str| format!(r#"(import "{name}" (instance))"#);
        let component = |imports: &[&str], exports: &[&str]| {
            let mut text = String::from("(component ");
            imports.iter().for_each(|name| text += &instance(name));
            text += "(instance $empty)";
            exports.iter().for_each(|name| text += &format!(r#"(export "{name}" (instance $empty))"#));
            wat::parse_str(text + ")").expect("text that assembles")
        };
        let at = |name: &str, version: &str| format!("{OURS}{name}@{version}");
        let check = |imports: &[&str], exports: &[&str], expect: &str| {
            let result = identify(&component(imports, exports));
            let text = result.map_or_else(|e| e.to_string(), |i| format!("{} {}", i.world, i.package));
            assert!(text.contains(expect), "{imports:?} {exports:?}: {text}");
        };
        let (life, router, log) = (at("lifecycle", "0.1.0"), at("router", "0.1.0"), at("host-log", "0.1.0"));
        check(&[&log], &[&life, &router], "router-policy pointsman:policy@0.1.0");
        check(&[], &[&life, &at("scheduler", "0.1.0")], "scheduler-policy");
        check(&[], &[&life, &at("telemetry", "0.1.0")], "telemetry-hook");
        check(&[], &[&at("lifecycle", "0.2.0"), &at("admission", "0.2.0")], "admission-policy");
        check(&[], &[&life, &at("admission", "0.1.0")], "implements none of the worlds");
        for (world, expect) in [
            ("router", "exports pointsman:policy/handover besides router: several"),
            ("admission", "there is none to take a snapshot of"),
            ("scheduler", "scheduler-policy pointsman:policy@0.2.0"),
            ("telemetry", "telemetry-hook"),
            ("kv-retention", "kv-retention-policy"),
            ("sampler", "sampler-policy"),
        ] {
            let exports = ["lifecycle", world, "handover"].map(|name| at(name, "0.2.0"));
            check(&[], &exports.each_ref().map(String::as_str), expect);
        }
        check(&[], &[&router], "implements none of the worlds");
        check(&[], &[&life, &router, &at("scheduler", "0.1.0")], "implements none of the worlds");
        check(&[], &[], "it exports nothing");
        check(&["wasi:io/poll@0.2.0", &log], &[&life, &router], "imports wasi:io/poll@0.2.0, and a policy may");
        check(&[&at("router", "0.1.0")], &[&life], "imports pointsman:policy/router@0.1.0");
        check(
            &[],
            &[&at("lifecycle", "0.3.0"), &at("router", "0.3.0")],
            "built against pointsman:policy@0.3.0; this host binds 0.1.x and 0.2.x; rebuild it",
        );
        check(&[], &[&at("lifecycle", "0.2.1"), &at("router", "0.2.1")], "router-policy pointsman:policy@0.2.1");
        check(&[&log], &[&at("lifecycle", "0.2.0"), &at("router", "0.2.0")], "@0.1.0 and @0.2.0; build all its parts");
        check(&[], &["acme:x/y@1.0.0"], "it exports acme:x/y@1.0.0");
    }

    #[test]
    fn a_core_module_needs_its_component_type() {
        let module = wat::parse_str("(module)").expect("text that assembles");
        assert!(matches!(to_component(&module, 1_000), Err(UploadError::PlainModule)));
        assert!(matches!(identify(b"\0asm\x0d\0\x01\0\xff\xff"), Err(UploadError::Malformed { .. })));
    }

    #[test]
    fn slots_have_worlds() {
        for (slot, world) in [
            ("admission", Some(World::Admission)),
            ("router", Some(World::Router)),
            ("scheduler", Some(World::Scheduler)),
            ("telemetry.slo-log", Some(World::Telemetry)),
            ("telemetry.", None),
            ("telemetry.X", None),
            ("kv-retention", Some(World::Retention)),
            ("sampler", Some(World::Sampler)),
            ("sampler.x", None),
        ] {
            assert_eq!(World::of_slot(slot), world, "{slot}");
        }
    }
}
