// A statically linked server in Rust's standard library: threads, a channel, a lock, a ticking clock.
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const SIDECAR: &str = "169.254.169.253:8234";

/// The answer of the original; in a copy the connection ends without one.
fn checkpoint() -> std::io::Result<String> {
    let mut stream = TcpStream::connect(SIDECAR)?;
    let host = format!("Host: {}\r\nContent-Length: 0\r\nConnection: close\r\n", SIDECAR);
    stream.write_all(format!("POST /checkpoint HTTP/1.1\r\n{}\r\n", host).as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.split("\r\n\r\n").nth(1).unwrap_or("").to_string())
}

fn main() -> std::io::Result<()> {
    let mut seed = [0u8; 16];
    File::open("/dev/urandom")?.read_exact(&mut seed)?;
    let token: String = seed.iter().map(|byte| format!("{:02x}", byte)).collect();
    let squares: Arc<HashMap<u64, u64>> = Arc::new((0..1_000_000).map(|n| (n, n * n)).collect());

    let started = Instant::now();
    let ticks = Arc::new(Mutex::new(0u64));
    let ticking = ticks.clone();
    thread::spawn(move || loop {
        thread::sleep(Duration::from_millis(20));
        *ticking.lock().unwrap() += 1;
    });

    // Asked over a channel; counts what it was asked.
    let (questions, asked) = channel::<(u64, Sender<(u64, u64)>)>();
    let table = squares.clone();
    thread::spawn(move || {
        let mut count = 0;
        for (number, answer) in asked {
            count += 1;
            answer.send((table[&number], count)).unwrap();
        }
    });
    let (warm, warmed) = channel();
    questions.send((7, warm)).unwrap();
    warmed.recv().unwrap();

    match checkpoint() {
        Ok(answer) if !answer.is_empty() => println!("{}", answer),
        Ok(_) => println!("end of file"),
        Err(error) => println!("{}", error),
    }
    for connection in TcpListener::bind("0.0.0.0:8000")?.incoming() {
        // A client that hangs up (a probe that only knocks) is no reason to end.
        let _ = connection.and_then(|mut connection| {
            let mut line = String::new();
            let mut reader = BufReader::new(connection.try_clone()?);
            while reader.read_line(&mut line)? > 0 && !line.ends_with("\r\n\r\n") {}
            if line.is_empty() {
                return Ok(());
            }
            let (back, answer) = channel();
            questions.send((999_999, back)).unwrap();
            let (square, count) = answer.recv().unwrap();
            let body = format!(
                "{{\"token\":\"{}\",\"square\":{},\"count\":{},\"ticks\":{},\"up_s\":{:.3}}}",
                token, square, count, *ticks.lock().unwrap(), started.elapsed().as_secs_f64()
            );
            write!(connection, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}", body.len(), body)
        });
    }
    Ok(())
}
