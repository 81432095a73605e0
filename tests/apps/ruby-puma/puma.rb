# A cluster of two workers. The app is loaded by the master before it forks; the request is made by a worker.
workers 2
threads 1, 2
port 8000, "0.0.0.0"
preload_app!
rackup "config.ru"

on_worker_boot do |index|
  next unless index.zero?

  Thread.new do
    sleep 1
    require "net/http"
    begin
      http = Net::HTTP.new("169.254.169.253", 8234, nil)
      http.read_timeout = 300
      puts http.post("/checkpoint", "").body
    rescue SystemCallError, IOError => e
      puts "Net::HTTP: #{e.class}"
    end
  end
end
