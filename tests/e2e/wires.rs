//! Small servers that do what servers should not, over each wire on which an upstream may be: HTTP/1.1, HTTP/2 in the clear,
//! and HTTP/2 within TLS.
//!
//! HTTP/2 is written here frame by frame (RFC 9113, and of RFC 7541 the static table), because a library would keep its user
//! from most of this. One request at a time on a connection is enough for it.

use std::io::{BufRead, BufReader, Error, Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use pointsman_tests::root;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

pub(super) const CHUNK: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"half\"}}]}\n\n";
/// The same as a whole answer.
const WHOLE: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"half\"},\"finish_reason\":\"stop\"}]}\n\n\
    data: [DONE]\n\n";

/// How a server is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    Http1,
    H2c,
    /// HTTP/2, chosen in the handshake.
    Tls,
}

/// How a small server treats a request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Manner {
    /// Says nothing.
    Hangs,
    /// Half a head, and nothing more.
    SlowHead,
    /// Resets the stream; of HTTP/1.1, closes the connection.
    Resets,
    /// Closes the connection once it has the request.
    Drops,
    /// Says this: status, content type, body.
    Says(u16, &'static str, &'static str),
    /// These bytes instead of an answer.
    Raw(&'static str),
    /// Begins an answer and waits.
    Begins,
    /// Begins an answer and closes the connection.
    Dies,
    /// Answers one request, and sends the next one away: it closes the connection, of HTTP/2 by a GOAWAY that leaves it out.
    Once,
    /// Leaves: when a second request comes, a GOAWAY that leaves it out, and then the answer to the first; HTTP/2 alone. It says
    /// when it has the first. On further connections it answers.
    Leaves,
    /// Refuses each first try of a request on a connection before it has begun it; HTTP/2 alone has a word for that.
    Refuses,
}

/// Somebody to talk to.
pub(super) trait Io: Read + Write + Send {}

impl<T: Read + Write + Send> Io for T {}

/// The server's end of TLS, with the certificate of the tests.
pub(super) fn tls(stream: TcpStream, protocols: &[&[u8]]) -> Box<dyn Io> {
    let pem = include_bytes!("registry.pem");
    let certificate = CertificateDer::from_pem_slice(pem).expect("a certificate");
    let key = PrivateKeyDer::from_pem_slice(pem).expect("a key");
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|config| config.with_no_client_auth().with_single_cert(vec![certificate], key));
    let mut config = config.expect("a good certificate");
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let connection = ServerConnection::new(Arc::new(config)).expect("a connection");
    Box::new(StreamOwned::new(connection, stream))
}

// === impl Wire ===

impl Wire {
    pub(super) const ALL: [Self; 3] = [Self::Http1, Self::H2c, Self::Tls];

    /// What an upstream on it has in its section.
    pub(super) fn lines(self) -> String {
        match self {
            Self::Http1 => String::new(),
            Self::H2c => "protocol = \"http2\"\n".to_owned(),
            Self::Tls => format!("ca_file = {:?}\n", root().join("tests/e2e/registry.pem")),
        }
    }

    fn shaken(self, stream: TcpStream) -> Box<dyn Io> {
        if self == Self::Tls { tls(stream, &[b"h2"]) } else { Box::new(stream) }
    }
}

/// A server of one manner; its URL, and word of each connection, of HTTP/2 each stream, that the other side has ended.
pub(super) fn server(wire: Wire, manner: Manner) -> (String, Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let scheme = if wire == Wire::Tls { "https" } else { "http" };
    let url = format!("{scheme}://{}", listener.local_addr().expect("an address"));
    let (closed, heard) = channel();
    std::thread::spawn(move || {
        for (n_before, connection) in listener.incoming().map_while(Result::ok).enumerate() {
            // Who has left answers as others do.
            let manner = match manner {
                Manner::Leaves if n_before > 0 => Manner::Says(200, "text/event-stream", WHOLE),
                manner => manner,
            };
            let closed = closed.clone();
            std::thread::spawn(move || {
                let io = wire.shaken(connection);
                // A client that goes away ends it.
                let _ = match wire {
                    Wire::Http1 => http1(io, manner, &closed),
                    Wire::H2c | Wire::Tls => Http2::new(io).serve(manner, &closed),
                };
            });
        }
    });
    (url, heard)
}

// === HTTP/1.1 ===

fn http1(io: Box<dyn Io>, manner: Manner, closed: &Sender<()>) -> Result<()> {
    let mut io = BufReader::new(io);
    let mut length = 0;
    for line in io.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty()) {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a number");
        }
    }
    io.read_exact(&mut vec![0; length])?;
    let begin = || {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        format!("{head}{:x}\r\n{CHUNK}\r\n", CHUNK.len())
    };
    let text = match manner {
        Manner::Hangs => String::new(),
        Manner::SlowHead => "HTTP/1.1 200 OK\r\ncontent-type: text/ev".to_owned(),
        Manner::Resets | Manner::Drops => return Ok(()),
        Manner::Says(status, kind, body) => full(status, kind, body),
        Manner::Begins | Manner::Dies => begin(),
        Manner::Once => full(200, "text/event-stream", WHOLE),
        Manner::Raw(text) => text.to_owned(),
        Manner::Refuses | Manner::Leaves => unreachable!("not in HTTP/1.1"),
    };
    // It may have heard enough.
    let _ = io.get_mut().write_all(text.as_bytes());
    if !matches!(manner, Manner::Says(..) | Manner::Dies) {
        // Until the other side closes, or asks again.
        let _ = io.read(&mut [0]);
        let _ = closed.send(());
    }
    Ok(())
}

fn full(status: u16, kind: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status} So\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nretry-after: 7\r\n\r\n{body}")
}

// === HTTP/2 ===

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
/// Flags: of a body's last frame, of an answer to SETTINGS and PING, of a whole head.
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
/// Error codes.
const INTERNAL_ERROR: u32 = 2;
const REFUSED_STREAM: u32 = 7;
/// The setting of how much a stream may be sent at first.
const INITIAL_WINDOW: u16 = 4;

struct Http2 {
    io: Box<dyn Io>,
    /// What a stream may be sent at first, and what the one at hand may be sent now. That of the connection is larger.
    initial_window: u32,
    window: u32,
}

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Http2 {
    fn new(io: Box<dyn Io>) -> Self {
        Self { io, initial_window: 65_535, window: 0 }
    }

    fn serve(mut self, manner: Manner, closed: &Sender<()>) -> Result<()> {
        let mut preface = [0; 24];
        self.io.read_exact(&mut preface)?;
        assert_eq!(&preface, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        self.write(SETTINGS, 0, 0, &[])?;
        let (mut n_asked, mut first) = (0, 0);
        loop {
            let frame = self.read()?;
            match frame.kind {
                RST_STREAM => drop(closed.send(())),
                DATA | HEADERS if frame.flags & END_STREAM != 0 => {
                    n_asked += 1;
                    if n_asked == 1 {
                        first = frame.stream;
                    }
                    self.window = self.initial_window;
                    if n_asked == 1 && matches!(manner, Manner::Leaves) {
                        let _ = closed.send(());
                    }
                    if !self.answer(manner, frame.stream, (n_asked, first))? {
                        return Ok(());
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether the connection goes on.
    fn answer(&mut self, manner: Manner, stream: u32, (n_asked, first): (u32, u32)) -> Result<bool> {
        match manner {
            Manner::Hangs => {}
            Manner::Leaves if n_asked == 1 => {}
            Manner::Leaves => {
                self.write(GOAWAY, 0, 0, &[first.to_be_bytes(), [0; 4]].concat())?;
                self.say(first, (200, "text/event-stream"), WHOLE, true)?;
            }
            Manner::SlowHead => self.write(HEADERS, 0, stream, &[0x88])?,
            Manner::Resets => self.write(RST_STREAM, 0, stream, &INTERNAL_ERROR.to_be_bytes())?,
            Manner::Refuses if n_asked % 2 == 1 => self.write(RST_STREAM, 0, stream, &REFUSED_STREAM.to_be_bytes())?,
            Manner::Says(status, kind, body) => self.say(stream, (status, kind), body, true)?,
            Manner::Refuses => self.say(stream, (200, "text/event-stream"), WHOLE, true)?,
            Manner::Once if n_asked == 1 => self.say(stream, (200, "text/event-stream"), WHOLE, true)?,
            Manner::Once => {
                // The last stream that was begun, and no error.
                self.write(GOAWAY, 0, 0, &[first.to_be_bytes(), [0; 4]].concat())?;
                return Ok(false);
            }
            Manner::Begins => self.say(stream, (200, "text/event-stream"), CHUNK, false)?,
            Manner::Dies => {
                self.say(stream, (200, "text/event-stream"), CHUNK, false)?;
                // A connection that ends with something unread may take along what was sent: the chunk has come before this.
                self.write(PING, 0, 0, &[0; 8])?;
                while self.read()?.kind != PING {}
                return Ok(false);
            }
            Manner::Raw(text) => {
                self.io.write_all(text.as_bytes())?;
                self.io.flush()?;
            }
            Manner::Drops => return Ok(false),
        }
        Ok(true)
    }

    fn say(&mut self, stream: u32, (status, kind): (u16, &str), body: &str, is_whole: bool) -> Result<()> {
        let mut head = match status {
            200 => vec![0x88],
            status => [&[0x08, 3], status.to_string().as_bytes()].concat(),
        };
        // By their places in the static table: content-type (31) and retry-after (53), with a text each.
        for (place, text) in [(31 - 15, kind), (53 - 15, "7")] {
            head.extend([0x0f, place, u8::try_from(text.len()).expect("a short text")]);
            head.extend(text.as_bytes());
        }
        self.write(HEADERS, END_HEADERS, stream, &head)?;
        let mut chunks = body.as_bytes().chunks(16_384).peekable();
        while let Some(chunk) = chunks.next() {
            while (self.window as usize) < chunk.len() {
                if self.read()?.kind == RST_STREAM {
                    return Ok(());
                }
            }
            self.window -= u32::try_from(chunk.len()).expect("a small chunk");
            let flags = if is_whole && chunks.peek().is_none() { END_STREAM } else { 0 };
            self.write(DATA, flags, stream, chunk)?;
        }
        Ok(())
    }

    fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Result<()> {
        let length = u32::try_from(payload.len()).map_err(Error::other)?.to_be_bytes();
        let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
        self.io.write_all(&[&head, payload].concat())?;
        self.io.flush()
    }

    /// The next frame; what it asks of the connection is done.
    fn read(&mut self) -> Result<Frame> {
        let mut head = [0; 9];
        self.io.read_exact(&mut head)?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.io.read_exact(&mut payload)?;
        let frame = Frame { kind, flags, stream: u32::from_be_bytes(stream), payload };
        let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().expect("four bytes"));
        match frame.kind {
            SETTINGS if flags & ACK == 0 => {
                let initial = frame.payload.chunks(6).find(|entry| entry[..2] == INITIAL_WINDOW.to_be_bytes());
                self.initial_window = initial.map_or(self.initial_window, |entry| number(&entry[2..]));
                self.write(SETTINGS, ACK, 0, &[])?;
            }
            PING if flags & ACK == 0 => self.write(PING, ACK, 0, &frame.payload)?,
            WINDOW_UPDATE if frame.stream != 0 => self.window += number(&frame.payload),
            _ => {}
        }
        Ok(frame)
    }
}
