//! The second half of `build.sh`: core modules in, components and `prebuilt/manifest.json` out.
//!
//! A small program instead of the `wasm-tools` command, so that a fresh machine needs nothing that Cargo.lock does not
//! pin, and so that guests are encoded by the same library with which the host encodes uploaded core modules. It also
//! says what a component imports, and refuses one that would not load: better here than at the upload.
#![expect(clippy::print_stdout, reason = "a command-line tool")]

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use sha2::{Digest, Sha256};

/// The guest that is also kept as a core module, because the host takes those too.
const ALSO_AS_CORE: &str = "route-least-loaded";

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The guest that must be refused for what it imports.
const FOREIGN: &str = "fixture-foreign";

/// What `prebuilt/manifest.json` says.
struct Manifest {
    compiler: String,
    source_hash: String,
    /// File name to digest and size.
    files: BTreeMap<String, (String, usize)>,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [mode, compiler, core_dir, guests @ ..] = args.as_slice() else {
        eprintln!("usage: componentize MODE COMPILER CORE_DIR GUEST... (build.sh calls it)");
        return ExitCode::from(2);
    };
    let outcome = match mode.as_str() {
        "" => build(compiler, Path::new(core_dir), guests),
        "--check" => check(compiler, Path::new(core_dir), guests),
        _ => Err(format!("unknown option {mode}: only --check is known").into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("componentize: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build(compiler: &str, core_dir: &Path, guests: &[String]) -> Outcome<()> {
    let prebuilt = plugins_dir().join("prebuilt");
    let files = encode_all(core_dir, guests)?;
    fs::create_dir_all(&prebuilt)?;
    for old in fs::read_dir(&prebuilt)? {
        let path = old?.path();
        if path.extension().is_some_and(|ext| ext == "wasm") {
            fs::remove_file(path)?;
        }
    }
    for (name, bytes) in &files {
        fs::write(prebuilt.join(name), bytes)?;
    }
    let manifest = Manifest::of(compiler, &files)?;
    fs::write(prebuilt.join("manifest.json"), manifest.to_json()?)?;
    println!("source hash {}", manifest.source_hash);
    Ok(())
}

/// Sources must be those of the committed components. Bytes must be equal only for the same compiler.
fn check(compiler: &str, core_dir: &Path, guests: &[String]) -> Outcome<()> {
    let built = Manifest::of(compiler, &encode_all(core_dir, guests)?)?;
    let text = fs::read_to_string(plugins_dir().join("prebuilt/manifest.json"))?;
    let committed = Manifest::from_json(&text)?;
    if committed.source_hash != built.source_hash {
        return Err("the sources changed after prebuilt/ was made: run plugins/build.sh and commit the result".into());
    }
    for (name, (digest, _)) in &committed.files {
        if sha256(&fs::read(plugins_dir().join("prebuilt").join(name))?) != *digest {
            return Err(format!("prebuilt/{name} is not the file that manifest.json records").into());
        }
    }
    if committed.files == built.files {
        println!("byte for byte what is committed");
    } else if committed.compiler == built.compiler {
        return Err(format!("{compiler} made other bytes from the same sources than before").into());
    } else {
        println!("same sources, other bytes: committed by {}, built by {compiler}", committed.compiler);
    }
    Ok(())
}

/// Every file of `prebuilt/`, by name.
fn encode_all(core_dir: &Path, guests: &[String]) -> Outcome<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for guest in guests {
        let core = fs::read(core_dir.join(format!("{}.wasm", guest.replace('-', "_"))))?;
        let component = wit_component::ComponentEncoder::default().module(&core)?.validate(true).encode()?;
        let imports = imports(&component)?;
        println!("{guest}: {} bytes, imports {}", component.len(), imports.join(", "));
        let foreign = imports.iter().find(|name| !name.starts_with("pointsman:policy/"));
        if let (Some(foreign), true) = (foreign, guest != FOREIGN) {
            return Err(format!("{guest} imports {foreign}, which the host does not offer").into());
        }
        if guest == ALSO_AS_CORE {
            files.insert(format!("{guest}.core.wasm"), core);
        }
        files.insert(format!("{guest}.wasm"), component);
    }
    // Hand-written components: what no guest compiler would make.
    for path in files_under(&plugins_dir().join("fixtures"))? {
        if let (Some(stem), true) = (path.file_stem(), path.extension().is_some_and(|ext| ext == "wat")) {
            files.insert(format!("fixture-{}.wasm", stem.display()), wat::parse_file(&path)?);
        }
    }
    Ok(files)
}

/// Names of the instances and functions that a component imports.
fn imports(component: &[u8]) -> Outcome<Vec<String>> {
    let mut names = Vec::new();
    for payload in wasmparser::Parser::new(0).parse_all(component) {
        match payload? {
            wasmparser::Payload::ComponentImportSection(section) => {
                for import in section {
                    names.push(import?.name.name.to_owned());
                }
            }
            // A nested component's imports are met by the outer one.
            wasmparser::Payload::ModuleSection { .. } | wasmparser::Payload::ComponentSection { .. } => break,
            _ => {}
        }
    }
    Ok(names)
}

// === impl Manifest ===

impl Manifest {
    fn of(compiler: &str, files: &BTreeMap<String, Vec<u8>>) -> Outcome<Self> {
        let files = files.iter().map(|(name, bytes)| (name.clone(), (sha256(bytes), bytes.len())));
        Ok(Self { compiler: compiler.to_owned(), source_hash: source_hash()?, files: files.collect() })
    }

    fn to_json(&self) -> Outcome<String> {
        let file = |(digest, size): &(String, usize)| serde_json::json!({ "sha256": digest, "size": size });
        let files: BTreeMap<&String, _> = self.files.iter().map(|(name, entry)| (name, file(entry))).collect();
        let json = serde_json::json!({ "compiler": self.compiler, "files": files, "source_hash": self.source_hash });
        Ok(serde_json::to_string_pretty(&json)? + "\n")
    }

    fn from_json(text: &str) -> Outcome<Self> {
        let json: serde_json::Value = serde_json::from_str(text)?;
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let files = json["files"].as_object().ok_or("manifest.json has no files")?;
        let entry = |entry: &serde_json::Value| {
            let size = entry["size"].as_u64().unwrap_or_default();
            (text(&entry["sha256"]), usize::try_from(size).unwrap_or(usize::MAX))
        };
        Ok(Self {
            compiler: text(&json["compiler"]),
            source_hash: text(&json["source_hash"]),
            files: files.iter().map(|(name, file)| (name.clone(), entry(file))).collect(),
        })
    }
}

// === sources ===

fn plugins_dir() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// One hash over everything that a guest is made of, so that a test can tell whether the components are current without
/// being able to build them. It is `sha256sum` of the output of `sha256sum` over the files, sorted bytewise by path:
/// `plugins/**/*.{rs,toml,wat}` without `target` and `prebuilt`, `plugins/Cargo.lock` and `wit/*.wit`, each line being the
/// digest in hex, two spaces, the path relative to the repository with `/`, and a line feed.
fn source_hash() -> Outcome<String> {
    let plugins = plugins_dir();
    let mut files = files_under(&plugins.join("../wit"))?;
    files.retain(|path| path.extension().is_some_and(|ext| ext == "wit"));
    files.extend(files_under(plugins)?.into_iter().filter(|path| {
        let source = path.extension().is_some_and(|ext| ["rs", "toml", "wat"].iter().any(|known| ext == *known));
        source || path.file_name().is_some_and(|name| name == "Cargo.lock")
    }));
    let repository = fs::canonicalize(plugins.join(".."))?;
    let mut lines = BTreeMap::new();
    for path in files {
        let path = fs::canonicalize(path)?;
        let name: Vec<_> = path.strip_prefix(&repository)?.iter().map(|part| part.to_string_lossy()).collect();
        lines.insert(name.join("/"), sha256(&fs::read(&path)?));
    }
    let text: String = lines.iter().map(|(path, digest)| format!("{digest}  {path}\n")).collect();
    Ok(sha256(text.as_bytes()))
}

/// Files below `folder`, build outputs left out.
fn files_under(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let skipped = ["target", "prebuilt"].iter().any(|name| entry.file_name() == *name);
        if !entry.file_type()?.is_dir() {
            files.push(entry.path());
        } else if !skipped {
            files.extend(files_under(&entry.path())?);
        }
    }
    Ok(files)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
