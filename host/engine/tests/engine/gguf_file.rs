//! Writes GGUF files for tests: plain enough that a broken one is a field with a wrong value.
//!
//! Why not candle's writer: it cannot write what a hostile file says. That it writes the same is a test of the engine.

/// A value of the metadata.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Flag(bool),
    Text(String),
    Texts(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
    /// A type and the bytes after it, as they are.
    Raw(u32, Vec<u8>),
}

/// A tensor: its sizes from the innermost, the number of its type, its bytes.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) sizes: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) bytes: Vec<u8>,
}

/// A file before it is written.
#[derive(Clone, Debug, Default)]
pub(crate) struct File {
    pub(crate) metadata: Vec<(String, Value)>,
    pub(crate) tensors: Vec<Tensor>,
}

impl File {
    pub(crate) fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.to_owned(), value));
    }

    pub(crate) fn write(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(key, &mut out);
            value.write(&mut out);
        }
        let mut offset = 0u64;
        for Tensor { name, sizes, kind, bytes } in &self.tensors {
            text(name, &mut out);
            out.extend((sizes.len() as u32).to_le_bytes());
            sizes.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (bytes.len() as u64).next_multiple_of(32);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&tensor.bytes);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out
    }
}

impl Value {
    fn write(&self, out: &mut Vec<u8>) {
        let list = |kind: u32, len: usize, out: &mut Vec<u8>| {
            out.extend(9u32.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        let mut one = |kind: u32, bytes: &[u8]| {
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        };
        match self {
            Self::U32(x) => one(4, &x.to_le_bytes()),
            Self::F32(x) => one(6, &x.to_le_bytes()),
            Self::Flag(x) => one(7, &[u8::from(*x)]),
            Self::Raw(kind, bytes) => one(*kind, bytes),
            Self::Text(x) => {
                one(8, &[]);
                text(x, out);
            }
            Self::Texts(all) => {
                list(8, all.len(), out);
                all.iter().for_each(|x| text(x, out));
            }
            Self::F32s(all) => {
                list(6, all.len(), out);
                all.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
            Self::I32s(all) => {
                list(5, all.len(), out);
                all.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
        }
    }
}

fn text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
