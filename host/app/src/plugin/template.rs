//! `pointsman plugin new`: a folder that builds, checks and runs as it is, and stands alone.
//!
//! Templates are files of `plugins/templates`, compiled into the binary with the package and the SDK that this host was
//! built with: a folder made by a host fits that host, with no network and no path into its sources. Words in double braces
//! are replaced; nothing else is generated, so that a template reads like what it makes.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, bail};

use super::project::{Kind, Lang, MANIFEST, Manifest, Name, Project};

/// The package, as guests see it.
pub(crate) const WIT: &str = include_str!("../../../../wit/policy.wit");

/// A file of a new folder: where it goes, and its text.
type File = (&'static str, &'static str);

macro_rules! template {
    ($path:expr) => {
        include_str!(concat!("../../../../plugins/templates/", $path))
    };
}

macro_rules! sdk {
    ($($name:literal),* $(,)?) => {
        &[$((concat!("vendor/pointsman-plugin/src/", $name), include_str!(concat!("../../../../plugins/sdk/src/", $name)))),*]
    };
}

/// The SDK's sources. A test compares the list with the folder.
const SDK: &[File] = sdk![
    "arena.rs",
    "bindings.rs",
    "config.rs",
    "export.rs",
    "hash.rs",
    "host.rs",
    "json.rs",
    "lib.rs",
    "queue.rs",
    "rows.rs",
    "testing.rs",
];

/// Makes the folder `name` in the current directory.
///
/// # Errors
/// It exists, or cannot be written.
pub(crate) fn create(name: &Path, kind: Kind, lang: Lang, out: &mut dyn Write) -> anyhow::Result<()> {
    let last = name.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let parsed: Name =
        last.parse().map_err(|rule| anyhow::anyhow!("`{}` is no name for a plugin: {rule}", name.display()))?;
    if name.exists() {
        bail!("{} exists already; choose another name or remove it", name.display());
    }
    let project = Project { folder: name.to_owned(), manifest: Manifest { name: parsed, kind, lang } };
    for (path, text) in files(kind, lang) {
        write(&project, path, &fill(text, &project.manifest))?;
    }
    write(&project, "wit/policy.wit", WIT)?;
    let manifest = toml::to_string(&project.manifest).context("a manifest is TOML")?;
    write(&project, MANIFEST, &format!("# What `pointsman plugin build` needs to know of this folder.\n{manifest}"))?;
    if lang == Lang::C {
        super::build::c_bindings(&project)?;
    }
    let folder = name.display();
    writeln!(out, "{folder}: {} in {}; edit {}, then:", kind.as_str(), lang.title(), source(kind, lang).0)?;
    if let Some(install) = lang.install(name) {
        writeln!(out, "  {install}")?;
    }
    writeln!(out, "  pointsman plugin build {folder}")?;
    let slot = kind.slot(&project.manifest.name);
    writeln!(out, "  pointsman policy activate {slot} {}", project.wasm().display())?;
    writeln!(out, "  {}", kind.undo(&project.manifest.name))?;
    Ok(())
}

fn write(project: &Project, path: &str, text: &str) -> anyhow::Result<()> {
    let path = project.folder.join(path);
    let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&path, text));
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// The policy itself.
fn source(kind: Kind, lang: Lang) -> File {
    macro_rules! of_kind {
        ($to:literal, $folder:literal, $extension:literal) => {
            match kind {
                Kind::Router => ($to, template!(concat!($folder, "/router", $extension))),
                Kind::Scheduler => ($to, template!(concat!($folder, "/scheduler", $extension))),
                Kind::Telemetry => ($to, template!(concat!($folder, "/telemetry", $extension))),
                Kind::Admission => ($to, template!(concat!($folder, "/admission", $extension))),
                Kind::KvRetention => ($to, template!(concat!($folder, "/kv-retention", $extension))),
                Kind::Sampler => ($to, template!(concat!($folder, "/sampler", $extension))),
            }
        };
    }
    match lang {
        Lang::Rust => of_kind!("src/lib.rs", "rust", ".rs.in"),
        Lang::Js => of_kind!("policy.js", "js", ".js"),
        Lang::Python => of_kind!("policy.py", "python", ".py"),
        Lang::C => of_kind!("policy.c", "c", ".c"),
    }
}

/// Everything but the manifest and the package.
fn files(kind: Kind, lang: Lang) -> Vec<File> {
    let mut files = vec![source(kind, lang)];
    let recipe: &[File] = match lang {
        Lang::Rust => &[
            ("Cargo.toml", template!("rust/Cargo.toml.in")),
            ("vendor/pointsman-plugin/Cargo.toml", template!("rust/sdk.Cargo.toml.in")),
            ("README.md", template!("rust/README.md")),
            (".gitignore", "/target\n*.wasm\n"),
        ],
        Lang::Js => &[
            ("package.json", template!("js/package.json")),
            ("README.md", template!("js/README.md")),
            (".gitignore", "/node_modules\n*.wasm\n"),
        ],
        Lang::Python => &[
            ("requirements.txt", template!("python/requirements.txt")),
            ("README.md", template!("python/README.md")),
            (".gitignore", "/.venv\n__pycache__\n*.wasm\n"),
        ],
        Lang::C => &[
            ("options.h", template!("c/options.h")),
            ("requirements.txt", template!("c/requirements.txt")),
            ("README.md", template!("c/README.md")),
            (".gitignore", "/.venv\n/bindings\n*.wasm\n"),
        ],
    };
    files.extend(recipe);
    if lang == Lang::Rust {
        files.extend(SDK);
    }
    files
}

/// Puts the plugin's own words in the place of the template's.
fn fill(text: &str, manifest: &Manifest) -> String {
    text.replace("{{name}}", &manifest.name.to_string())
        .replace("{{kind}}", manifest.kind.as_str())
        .replace("{{world}}", manifest.kind.world())
        .replace("{{slot}}", &manifest.kind.slot(&manifest.name))
        .replace("{{undo}}", &manifest.kind.undo(&manifest.name))
        .replace("{{summary}}", manifest.kind.summary())
        .replace("{{wit}}", wit_version())
        .replace("{{host}}", env!("CARGO_PKG_VERSION"))
}

/// The version of the package.
pub(crate) fn wit_version() -> &'static str {
    let package = WIT.lines().find_map(|line| line.strip_prefix("package pointsman:policy@"));
    package.map_or("", |version| version.trim_end_matches(';'))
}

impl Lang {
    /// Its name, as people write it.
    fn title(self) -> &'static str {
        match self {
            Self::Rust => "Rust",
            Self::Js => "JavaScript",
            Self::Python => "Python",
            Self::C => "C",
        }
    }

    /// The command that installs its tools into a plugin folder; Rust's come with the compiler.
    pub(crate) fn install(self, folder: &Path) -> Option<String> {
        let folder = folder.display();
        match self {
            Self::Rust => None,
            Self::Js => Some(format!("npm install --prefix {folder}")),
            Self::Python | Self::C => Some(format!(
                "python3 -m venv {folder}/.venv && {folder}/.venv/bin/pip install -r {folder}/requirements.txt"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_template_is_whole_and_names_its_plugin() {
        for kind in Kind::value_variants().iter().copied() {
            for lang in Lang::value_variants().iter().copied() {
                let folder = tempfile::tempdir().expect("a folder");
                let at = folder.path().join("my-own");
                let mut said = Vec::new();
                create(&at, kind, lang, &mut said).expect("a new folder");
                let project = Project::open(&at).expect("a plugin folder");
                assert_eq!((project.manifest.kind, project.manifest.lang), (kind, lang));
                for (path, _) in files(kind, lang) {
                    let text = std::fs::read_to_string(at.join(path)).expect("it was written");
                    let ours = !path.starts_with("vendor") || path.ends_with(".toml");
                    assert!(!(ours && text.contains("{{")), "{kind:?} {lang:?} {path} keeps a placeholder");
                }
                assert_eq!(std::fs::read_to_string(at.join("wit/policy.wit")).expect("the package"), WIT);
                assert!(String::from_utf8_lossy(&said).contains("pointsman plugin build"));
                let again = create(&at, kind, lang, &mut said).expect_err("it exists").to_string();
                assert!(again.contains("exists already"), "{again}");
            }
        }
    }

    #[test]
    fn the_whole_sdk_goes_along() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins/sdk/src");
        let entries = std::fs::read_dir(folder).expect("the SDK");
        let mut names: Vec<String> = entries
            .map(|e| format!("vendor/pointsman-plugin/src/{}", e.expect("a file").file_name().display()))
            .collect();
        names.sort();
        assert_eq!(names, SDK.iter().map(|(path, _)| *path).collect::<Vec<_>>(), "keep the list SDK complete");
        assert!(wit_version().starts_with("0."), "{}", wit_version());
    }
}
