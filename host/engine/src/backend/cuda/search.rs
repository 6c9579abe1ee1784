//! Where NVIDIA's libraries are looked for, which may lie in folders that the loader does not search.

use std::path::{Path, PathBuf};

/// The first library with one of these names that would do: in `folders`, then where the loader looks. `open` says of a path why one
/// that is there would not.
///
/// # Errors
/// Why the first that was found would not do; nothing where there is none.
pub(super) fn first<T, E>(
    folders: &[PathBuf],
    names: &'static [&'static str],
    open: impl Fn(&Path) -> Option<Result<T, E>>,
) -> Result<T, Option<E>> {
    let in_folders = folders.iter().flat_map(|folder| names.iter().map(move |name| folder.join(name)));
    let candidates = in_folders.filter(|path| path.exists()).chain(names.iter().map(PathBuf::from));
    let mut none = None;
    for found in candidates.filter_map(|path| open(&path)) {
        match found {
            Ok(library) => return Ok(library),
            Err(why) => none = none.or(Some(why)),
        }
    }
    Err(none)
}

/// Makes a library from C++ text; `false`, and a line that says so, without a compiler.
#[cfg(test)]
pub(super) fn stand_in(path: &Path, text: &str) -> bool {
    let (source, name) = (path.with_extension("cpp"), path.file_name().unwrap_or_default().to_string_lossy());
    std::fs::write(&source, text).expect("the test's folder is writable");
    let name = format!("-Wl,-soname,{name}");
    let made = std::process::Command::new("c++").args(["-shared", "-fPIC", &name, "-o"]).args([path, &source]).output();
    match made {
        Ok(made) => assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr)),
        Err(error) => eprintln!("skipped: no C++ compiler: {error}"),
    }
    path.exists()
}
