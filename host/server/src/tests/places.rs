//! A listener whose places are all taken: who gives way, and who is told to come back.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::http2::{Served, connect, served};
use crate::ServerConfig;

/// A request whose body does not come.
const HELD: &str =
    "POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: 7\r\n\r\n";
const HEALTH: &str = "GET /health HTTP/1.1\r\nhost: h\r\n\r\n";

async fn places(n: usize) -> Served {
    served(ServerConfig { max_connections: n, ..ServerConfig::default() }).await
}

async fn open(at: SocketAddr, sent: &str) -> TcpStream {
    let mut stream = TcpStream::connect(at).await.expect("it listens");
    stream.write_all(sent.as_bytes()).await.expect("room");
    stream
}

/// The beginning of an answer; nothing where the connection ends.
async fn status(stream: &mut TcpStream) -> String {
    let mut said = vec![0; 4_096];
    let n = stream.read(&mut said).await.unwrap_or(0);
    String::from_utf8_lossy(&said[..n]).chars().skip("HTTP/1.1 ".len()).take(3).collect()
}

/// All of an answer after which the connection ends.
async fn whole(mut stream: TcpStream) -> String {
    let mut said = Vec::new();
    stream.read_to_end(&mut said).await.expect("an end");
    String::from_utf8_lossy(&said).into_owned()
}

#[tokio::test]
async fn who_has_waited_longest_gives_way_and_who_has_a_request_does_not() {
    let Served { data, serving: _serving, stop: _stop, .. } = places(3).await;
    // The first to come has a request, the second is silent, and the third was the last to ask.
    let mut busy = open(data, HELD).await;
    let mut silent = open(data, "GET /hea").await;
    let mut idle = open(data, HEALTH).await;
    assert_eq!(status(&mut idle).await, "200");
    let mut late = open(data, HEALTH).await;
    assert_eq!(status(&mut late).await, "200");
    assert_eq!(status(&mut silent).await, "", "it is closed");
    idle.write_all(HEALTH.as_bytes()).await.expect("it is open");
    assert_eq!(status(&mut idle).await, "200");
    busy.write_all(b"no JSON").await.expect("it is open");
    assert_eq!(status(&mut busy).await, "400", "its request went on");
}

#[tokio::test]
async fn a_host_that_is_busy_on_every_place_answers_probes_and_turns_others_away() {
    let Served { data, serving: _serving, stop: _stop, .. } = places(2).await;
    let mut held = [open(data, HELD).await, open(data, HELD).await];
    // More than may be beyond the bound at a time.
    for _ in 0..40 {
        let health = whole(open(data, HEALTH).await).await;
        assert!(health.starts_with("HTTP/1.1 200") && health.contains("connection: close"), "{health}");
        let refused = whole(open(data, "GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n").await).await;
        assert!(refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after: 1"), "{refused}");
    }
    let mut client = connect(data, &h2::client::Builder::new()).await;
    assert_eq!(client.get("http://x/health").await.expect("an answer").status(), 200);
    assert_eq!(client.get("http://x/v1/models").await.expect("an answer").status(), 429);
    for stream in &mut held {
        stream.write_all(b"no JSON").await.expect("it is open");
        assert_eq!(status(stream).await, "400", "its request went on");
    }
}

#[tokio::test]
async fn streams_take_the_places_of_silent_connections() {
    let Served { data, serving: _serving, stop: _stop, .. } = places(4).await;
    let mut silent = [open(data, "").await, open(data, "").await, open(data, "").await];
    let mut client = connect(data, &h2::client::Builder::new()).await;
    // Whoever comes is left alone for a while; this one waits for the end of that, and takes a place.
    let mut late = open(data, HEALTH).await;
    assert_eq!(status(&mut late).await, "200");
    client.finds_places(3).await;
    for stream in &mut silent {
        assert_eq!(status(stream).await, "", "it is closed");
    }
}

#[tokio::test]
async fn who_is_served_has_turns_while_many_come_at_once() {
    const N: usize = 64;
    let Served { data, serving: _serving, stop: _stop, .. } = places(N).await;
    // The kernel takes them before the host has looked.
    let clients = (0..N).map(|_| {
        let mut client = std::net::TcpStream::connect(data).expect("it listens");
        std::io::Write::write_all(&mut client, HEALTH.as_bytes()).expect("room");
        client.set_nonblocking(true).expect("a socket");
        TcpStream::from_std(client).expect("a runtime")
    });
    let mut clients: Vec<TcpStream> = clients.collect();
    let answers = async {
        for client in &mut clients {
            assert_eq!(status(client).await, "200");
        }
    };
    let mut turns = 0;
    let others = async {
        loop {
            turns += 1;
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = answers => {}
        () = others => {}
    }
    // One after every four of them.
    assert!(turns >= N / 4, "{turns}");
}
