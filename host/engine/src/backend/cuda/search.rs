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
